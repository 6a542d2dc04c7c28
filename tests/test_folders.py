"""Which files of a folder, a tree or a list are taken as images, and what is reported about the others."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.images import ImageFolder
from dataset.layouts import unlabelled_images
from tests.golden import synthetic_image, write_city, write_gta5
from tests.scripts import EAGER, EVALUATE, TRAIN, fails, run, train_words
from utils.system.errors import UserError

SIZE = (64, 48)
RGB, IDS = synthetic_image(3, 80, 60)
IN_COLOUR = np.random.default_rng(1).integers(0, 256, (35, 3), np.uint8)[IDS]


def save(path, pixels=RGB):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_error(path, option="--predict") -> str:
    with pytest.raises(UserError) as caught:
        ImageFolder(path, SIZE) if option == "--predict" else unlabelled_images(path, option, SIZE)
    return str(caught.value)


@pytest.fixture
def gta5(tmp_path):
    return write_gta5(tmp_path / "GTA5", {f"{i:05d}": i for i in range(1, 4)}, (64, 36))


@pytest.fixture
def city(tmp_path):
    for name in ("train", "val"):
        write_city(tmp_path / "City", name, {f"{i:06d}": i for i in range(3)}, (64, 32))
    return tmp_path / "City"


@pytest.mark.parametrize("image, label", [
    ("rgb_anon/fog/a_rgb_anon.png", "gt/fog/a_gt_labelIds.png"), ("img_dir/a.png", "ann_dir/a.png"),
    ("JPEGImages/a.jpg", "SegmentationClass/a.png"), ("photos/a.jpg", "masks/a.png"),
    ("images/a.jpg", "annotations/a.png"), ("train/a.png", "trainannot/a.png"),
    ("labels_project/a.jpg", "labels_project/a_mask.png"), ("Gannet/a.jpg", "Gannet/aLabelTrainIds.PNG"),
])
def test_labels_among_images_are_an_error(tmp_path, image, label):
    save(tmp_path / image)
    for pixels in (IDS, IN_COLOUR):
        save(tmp_path / label, pixels)
        for option in ("--predict", "--data-dir-target"):
            assert f"{tmp_path / label}: a label, which would be taken" in folder_error(tmp_path, option)


def test_photographs_pass_whatever_they_are_called(tmp_path):
    for name in ("masks/a.jpg", "gt/b.png", "label/c_label.png", "d_mask.png"):
        save(tmp_path / name)
    save(tmp_path / "masks" / "grey.png", RGB[..., 0])
    save(tmp_path / "plain" / "drawing.png", IN_COLOUR)
    (tmp_path / "masks" / "damaged.png").write_bytes(b"no image")  # is reported when it is its turn
    (tmp_path / "masks" / "a.JPG").write_bytes((tmp_path / "masks" / "a.jpg").read_bytes())
    assert len(set(ImageFolder(tmp_path, SIZE).images)) == 8
    save(tmp_path / "only" / "masks" / "a.png", IDS)  # nothing in colour next to it
    assert len(ImageFolder(tmp_path / "only", SIZE)) == 1


def test_folders_of_systems_are_skipped(tmp_path, city, gta5):
    images = city / "leftImg8bit" / "val" / "aachen"
    for root in (tmp_path / "own", images.parent, images, gta5 / "images"):
        for name in ("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/a.png", "#recycle/a.png",
                     "System Volume Information/a.png", "__MACOSX/a.png", "._a.png"):
            save(root / name)
    save(tmp_path / "own" / "a.png")
    assert ImageFolder(tmp_path / "own", SIZE).names == ["a"]
    assert len(cityscapesDataSet(city, "val", labels=True)) == len(GTA5DataSet(gta5)) == 3


@pytest.mark.parametrize("above", ["leftImg8bit_trainvaltest/leftImg8bit", "leftImg8bit_foggy"])
def test_sets_of_cityscapes_are_no_plain_target(tmp_path, city, above):
    place = tmp_path / "unpacked" / above
    shutil.copytree(city / "leftImg8bit", place)
    for given in (place, tmp_path / "unpacked"):
        message = folder_error(given, "--data-dir-target")
        assert "train and val of Cityscapes are in it" in message
        assert f"give --data-dir-target {place.parent}, with leftImg8bit and gtFine in it" in message
    assert len(ImageFolder(place, SIZE)) == 6  # for --predict
    assert len(unlabelled_images(place / "val", "--data-dir-target", SIZE)) == 3


def test_gtFine_among_the_images_of_cityscapes(city):
    for name in ("train", "val"):
        for path in (city / "gtFine" / name / "aachen").iterdir():
            shutil.copy(path, city / "leftImg8bit" / name / "aachen")
    data = cityscapesDataSet(city, "train")
    assert len(data) == 3 and all("_leftImg8bit" in name for name in data.names)
    (line,) = data.reports
    assert f"{city / 'leftImg8bit' / 'train'}: 3 of 6 images skipped" in line and "_leftImg8bit" in line
    assert len(cityscapesDataSet(city, "val", labels=True)) == 3
    for path in (city / "leftImg8bit" / "train" / "aachen").glob("*_leftImg8bit.png"):
        save(path.with_name(path.name.replace("_leftImg8bit", "")))
        path.unlink()
    with pytest.raises(UserError, match="aachen_000000_000019_gtFine_labelIds.png: a label"):
        cityscapesDataSet(city, "train")


def test_png_and_jpeg_in_any_case_are_images_of_all_data_sets(gta5, city, tmp_path):
    os.rename(gta5 / "images" / "00001.png", gta5 / "images" / "00001.PNG")
    os.rename(gta5 / "labels" / "00002.png", gta5 / "labels" / "00002.PNG")
    Image.open(gta5 / "images" / "00003.png").save(gta5 / "images" / "00003.jpg")
    (gta5 / "images" / "00003.png").unlink()
    data = GTA5DataSet(gta5, size=(32, 18))
    assert [path.name for path in data.images] == ["00001.PNG", "00002.png", "00003.jpg"]
    assert [path.name for path in data.labels] == ["00001.png", "00002.PNG", "00003.png"]
    savemat(tmp_path / "split.mat", {"trainIds": [1, 3]})
    assert GTA5DataSet(gta5, split=str(tmp_path / "split.mat"), subset="train").names == ["00001", "00003"]
    (tmp_path / "list.txt").write_text("00003.jpg\n00001.png\n")  # the case of a suffix may differ, too
    chosen = GTA5DataSet(gta5, str(tmp_path / "list.txt"))
    assert [path.name for path in chosen.images] == ["00003.jpg", "00001.PNG"]

    images = city / "leftImg8bit" / "val" / "aachen"
    for path, suffix in zip(sorted(images.iterdir()), (".JPG", ".jpeg")):
        Image.open(path).save(path.with_suffix(suffix), "JPEG")
        path.unlink()
    assert len([*cityscapesDataSet(city, "val", size=SIZE, labels=True)]) == 3


def test_foggy_cityscapes_finds_its_labels(city):
    images = city / "leftImg8bit" / "val" / "aachen"
    for path in list(images.iterdir()):
        for beta in ("0.005", "0.01", "0.02"):
            shutil.copy(path, images / f"{path.stem}_foggy_beta_{beta}.png")
        path.unlink()
    data = cityscapesDataSet(city, "val", size=SIZE, labels=True)
    assert len(set(data.names)) == 9 and data.names[2] == "aachen_000000_000019_leftImg8bit_foggy_beta_0.02"
    assert data.labels[2].name == "aachen_000000_000019_gtFine_labelIds.png" and not data.reports


def test_own_names_in_a_tree_of_cityscapes(tmp_path):
    for place in ("val/home", "val/far/away"):
        save(tmp_path / "leftImg8bit" / place / f"{place[4:7]}.jpg")
        save(tmp_path / "gtFine" / place / f"{place[4:7]}_gtFine_labelIds.png", IDS)
    data = cityscapesDataSet(tmp_path, "val", size=SIZE, labels=True)
    assert data.names == ["far", "hom"] and data[1][1].shape == IDS.shape and not data.reports


def test_images_of_other_formats_are_counted(gta5, city, tmp_path):
    (tmp_path / "own" / "a").mkdir(parents=True)
    for folder in (gta5 / "images", city / "leftImg8bit" / "val" / "aachen", tmp_path / "own" / "a"):
        for name in ("x.bmp", "x.TIF", "y.webp", "y.gif", "y.jfif", "Thumbs.db", "notes.txt"):
            (folder / name).touch()
    text = "images skipped, as only PNG and JPEG are read: "
    message = folder_error(tmp_path / "own")
    assert "no image (.png, .jpg, .jpeg) in it" in message
    assert f": 5 of 5 {text}a/x.TIF, a/x.bmp, a/y.gif …" in message
    save(tmp_path / "own" / "z.png")
    for data in (ImageFolder(tmp_path / "own", SIZE), GTA5DataSet(gta5), cityscapesDataSet(city, "val")):
        (line,) = data.reports
        assert f": 5 of {5 + len(data)} {text}" in line
    with pytest.raises(UserError, match=f"val: 5 of 8 {text}aachen/x.TIF"):
        cityscapesDataSet(city, "val", labels=True)


def test_a_label_without_its_image_is_an_error_in_a_val_set(city, tmp_path):
    name = "val/aachen/aachen_000001_000019"
    (city / "leftImg8bit" / f"{name}_leftImg8bit.png").unlink()
    label = city / "gtFine" / f"{name}_gtFine_labelIds.png"
    with pytest.raises(UserError, match=f"1 of 3 labels have no image: {label}"):
        cityscapesDataSet(city, "val", labels=True)
    (tmp_path / "list.txt").write_text("aachen/aachen_000002_000019_leftImg8bit.png\n")
    assert len(cityscapesDataSet(city, "val", str(tmp_path / "list.txt"), labels=True)) == 1
    assert len(cityscapesDataSet(city, "val")) == 2


def test_links_that_lead_nowhere_are_told_at_the_start(gta5, city, tmp_path):
    save(tmp_path / "own" / "a.png")
    for link in (tmp_path / "own" / "b", tmp_path / "own" / "c.jpg"):
        link.symlink_to("nowhere")
        assert f"1 links below it lead nowhere: {link};" in folder_error(tmp_path / "own")
        link.unlink()
    for folder in ("labels", "images"):
        link = gta5 / folder / "00002.png"
        link.rename(gta5 / "elsewhere.png")
        link.symlink_to("../elsewhere.png")
        assert len(GTA5DataSet(gta5)) == 3
        (gta5 / "elsewhere.png").unlink()
        with pytest.raises(UserError, match=f"(1 of 3 label files are missing|lead nowhere): {link}"):
            GTA5DataSet(gta5)
        link.unlink()
        save(link)
    (city / "leftImg8bit" / "train" / "bonn").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="lead nowhere: .*/bonn;"):
        cityscapesDataSet(city, "train")


def test_entries_of_lists_are_relative_to_the_images(gta5, city, tmp_path):
    """Any path to an image below the folder will do; others would be trained as their own labels."""
    path = tmp_path / "list.txt"
    (tmp_path / "link").symlink_to(gta5)
    lines = f"{gta5}/images/00002.png\n\n../images/00001.png\n./00003.png\n"
    path.write_text(lines, encoding="utf-8-sig")  # with a byte-order mark, as Windows' editors begin a file
    for root in (gta5, tmp_path / "link"):
        labels = [root / "labels" / f"0000{i}.png" for i in (2, 1, 3)]
        assert GTA5DataSet(root, str(path)).labels == labels
    for entry in ("../labels/1.png", f"{gta5}/labels/00001.png", "/", "..", "../images", "/nowhere/\0/a.png"):
        path.write_text(f"00002.png\n{entry}\n")
        with pytest.raises(UserError, match=f"{path}: {entry} is not below {gta5 / 'images'}"):
            GTA5DataSet(gta5, str(path))
    copy = shutil.copytree(city, tmp_path / "Copy")
    image = "leftImg8bit/val/aachen/aachen_000001_000019_leftImg8bit.png"
    path.write_text(f"{copy / image}\n")
    with pytest.raises(UserError, match=f"{copy / image} is not below {city}"):
        cityscapesDataSet(city, "val", str(path), labels=True)
    assert cityscapesDataSet(copy, "val", str(path)).names == ["aachen_000001_000019_leftImg8bit"]


def test_both_scripts_report_what_is_skipped(data, reference, tmp_path):
    city = shutil.copytree(data / "City", tmp_path / "City")
    place = city / "leftImg8bit"
    (place / "train" / "aachen" / "more.webp").touch()
    save(place / "val" / "aachen" / "x.png")
    argv = train_words(data, tmp_path / "run", "--data-dir-target", city, "--num-steps", 1, *EAGER)
    output = run(TRAIN, *argv).stdout
    target = f"{place / 'train'}: 1 of 4 images skipped, as only PNG and JPEG are read: aachen/more.webp"
    val = f"{place / 'val'}: 1 of 4 images skipped, as others have _leftImg8bit in their names: aachen/x.png"
    assert target in output and val in output
    evaluation = ["--restore-from", reference / "GTA5_1.ckpt", "--input-size", "64,48", *EAGER]
    evaluation += ["--save-path", tmp_path / "r"]
    assert val in run(EVALUATE, *evaluation, "--data-dir", city).stdout
    assert json.loads((tmp_path / "r" / "result.json").read_text())["images"] == 3
    assert target in run(EVALUATE, *evaluation, "--predict", place / "train").stdout
    message = fails(TRAIN, *argv, "--data-dir-target", place, "--snapshot-dir", tmp_path / "other")
    assert f"give --data-dir-target {city}, with leftImg8bit and gtFine in it" in message
