"""One's own target images and classes through the command lines, and the pair of real data sets."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image

import CLAN_evaluate_city
from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, IGNORE_LABEL, INFO, INFO_PATH, read_classes
from dataset.gta5_dataset import GTA5DataSet
from dataset.images import ImageFolder, names_crc32
from dataset.labels import check_labels
from dataset.transform import LABEL_TO_TRAIN
from options.evaluate_options import get_arguments
from tests.scripts import EAGER, EVALUATE, ROOT, TRAIN, fails, module, python, rows_of, run, train_words
from utils import checkpoint
from utils.system.errors import UserError
from utils.tools import ablation
from utils.tools.camvid_idd import convert

RNG = np.random.default_rng(20)
FAST = ["--num-steps", 2, "--save-pred-every", 1, *EAGER]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of several sizes and depths; two share a name, one is a portrait that lies on its side."""
    folder, exif = tmp_path_factory.mktemp("own"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (folder / "trip" / "day").mkdir(parents=True)
    for name, size in (("a.png", (60, 90)), ("trip/a.jpg", (77, 131)), ("trip/day/b.jpeg", (100, 48))):
        Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    shutil.copy(folder / "a.png", folder / "trip" / "a.JPEG")
    with Image.open(folder / "trip" / "day" / "b.jpeg") as portrait:
        portrait.transpose(Image.Transpose.ROTATE_90).save(folder / "trip" / "day" / "c.png", exif=exif)
    return folder


@pytest.fixture(scope="module")
def adapted(images, data, tmp_path_factory):
    """A run whose target are these images, and its output."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, run(TRAIN, *train_words(data, folder, "--data-dir-target", images, *FAST)).stdout


def test_training_takes_a_plain_folder_as_its_target(adapted, images):
    folder, output = adapted
    assert f"no validation: {images} is no Cityscapes tree; see --data-dir-val" in output
    assert "5 target images" in output
    assert len(rows_of(folder / "loss.csv")) == 2 and not rows_of(folder / "miou.csv")
    assert all(float(row["loss_D_t"]) > 0 for row in rows_of(folder / "loss.csv"))
    done = run(TRAIN, "--continue-train", folder)
    assert f"CLAN_evaluate_city.py --restore-from {folder / 'GTA5_2.ckpt'} --predict {images}" in done.stdout
    assert "--input-size 64,48 --device cpu\n" in done.stdout
    data = ImageFolder(images, (64, 48))
    assert data.names == ["a.png", "trip/a.JPEG", "trip/a.jpg", "trip/day/b.jpeg", "trip/day/c.png"]
    (b,), (c,) = data[3], data[4]  # c is what JPEG made of b, upright
    assert np.array_equal(b, c) and data.read(3, scale=1.1)[0].shape == (3, 52, 70)
    assert np.array_equal(data.read(3, mirror=True)[0], b[:, :, ::-1])


def test_images_of_the_current_folder_are_found(images, monkeypatch):
    monkeypatch.chdir(images / "trip" / "day")
    assert ImageFolder(".", (64, 48)).names == ["b", "c"]
    assert ImageFolder("c.png", (64, 48)).names == ["c"]


def test_linked_folders_are_searched_once_and_hidden_ones_are_not(images, tmp_path):
    (tmp_path / "all").mkdir()
    for link in ("a link", "another name"):
        (tmp_path / "all" / link).symlink_to(images / "trip")
    (tmp_path / "all" / "circle").symlink_to(tmp_path / "all")
    shutil.copytree(images, tmp_path / "all" / ".hidden")
    data = ImageFolder(tmp_path / "all", (64, 48))
    assert data.names == [f"a link/{name}" for name in ("a.JPEG", "a.jpg", "day/b.jpeg", "day/c.png")]
    data.names.append(os.fsdecode(b"\xb7.png"))  # in GBK
    assert names_crc32(data)


def test_a_folder_that_may_not_be_read_is_an_error_and_skipped_by_predict(images, monkeypatch, tmp_path):
    scandir = os.scandir

    def locked(path):
        if os.path.basename(path) == "day":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # root may read all
    with pytest.raises(PermissionError, match="Permission denied: .*day"):
        ImageFolder(images, (64, 48), "--data-dir-target")
    data = ImageFolder(images, (64, 48))
    [locked] = data.locked
    assert locked.endswith("/day") and data.names and not [name for name in data.names if "day" in name]
    monkeypatch.setattr(CLAN_evaluate_city, "predictions", lambda *_: ())
    argv = ["--restore-from", "x", "--predict", str(images), "--save-path", str(tmp_path / "r")]
    args = get_arguments(argv)
    with pytest.raises(UserError, match="^folders that may not be read were skipped: .*day$"):
        CLAN_evaluate_city.predict(args, None, data)
    with pytest.raises(UserError, match="no image can be reached, as folders may not be read: .*day"):
        ImageFolder(images / "trip" / "day", (64, 48))


@pytest.mark.slow
def test_prediction_re_estimates_on_the_folder_itself(adapted, images, data, tmp_path):
    argv = ["--restore-from", adapted[0] / "GTA5_2.ckpt", "--input-size", "64,48", *EAGER]
    command = [EVALUATE, *argv, "--predict", images, "--save-path", tmp_path / "r", "--batch-size", 2]

    def maps(*more) -> tuple[list[np.ndarray], str]:
        output = run(*command, *more).stdout
        paths = sorted((tmp_path / "r" / "predict" / "labelIds").rglob("*.png"))
        return [np.asarray(Image.open(path)) for path in paths], output

    (plain, _), (own, output) = maps(), maps("--adapt-bn", 3)
    (again, _), (_, other) = (maps("--adapt-bn", 3, "--data-dir", x) for x in (images, data / "City"))
    assert f"re-estimated on 3 unlabelled images of {images}" in output
    assert f"re-estimated on 3 unlabelled images of {data / 'City'}" in other
    assert len(own) == 5 and all(np.array_equal(*pair) for pair in zip(own, again))
    assert any((a != b).any() for a, b in zip(plain, own))
    assert "no images with labels in it" in fails(EVALUATE, *argv, "--data-dir", images)


def test_a_target_folder_that_does_not_fit_is_named(images, data, tmp_path):
    argv = train_words(data, tmp_path / "run", "--data-dir-target")
    assert "Cityscapes not found" in fails(TRAIN, *argv, tmp_path / "nowhere")
    assert "--set and --data-list-target are for Cityscapes" in fails(TRAIN, *argv, images, "--set", "val")


@pytest.mark.slow
def test_a_project_of_seven_classes_edits_one_file(adapted, images, data, tmp_path):
    """Training, checkpoint, evaluation and predictions follow dataset/cityscapes_list/info.json."""
    project = tmp_path / "project"
    for part in ("dataset", "model", "options", "utils"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (TRAIN, EVALUATE):
        shutil.copy(ROOT / script, project)
    path = project / INFO_PATH.relative_to(ROOT)
    groups = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)  # trainId of the 19 -> of the 7
    names = ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    ids = {i: 255 if t == 255 else groups[t] for i, t in INFO["label2train"]}
    seven = {"classes": 7, "label": names, "label2train": list(ids.items()), "palette": INFO["palette"][:7]}
    path.write_text(json.dumps(seven))

    def here(*argv, code: int = 0):
        return python([project / argv[0], *argv[1:]], tmp_path, code, PYTHONPATH="")

    here(TRAIN, *train_words(data, tmp_path / "run", *FAST))
    last, ckpt = rows_of(tmp_path / "run" / "miou.csv")[-1], tmp_path / "run" / "GTA5_2.ckpt"
    assert list(last) == ["step", "mIoU", *names]
    content = checkpoint.read(str(ckpt))
    assert content["classes"] == ",".join(names) and content["net_D.conv1.weight"].shape[1] == 7
    argv = ["--input-size", "64,48", *EAGER, "--save-path", tmp_path / "r"]
    here(EVALUATE, "--restore-from", ckpt, "--data-dir", data / "City", *argv, "--save")
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert list(result["IoU"]) == names and "mIoU_16" not in result
    assert result["mIoU"] == pytest.approx(float(last["mIoU"]), abs=1e-6)
    first = [min(i for i, t in ids.items() if t == n) for n in range(7)]  # of the ids of a class the first
    for file in (tmp_path / "r" / "labelIds").iterdir():
        assert set(np.unique(Image.open(file))) <= set(first)
    other = adapted[0] / "GTA5_2.ckpt"
    message = here(EVALUATE, "--restore-from", other, *argv, "--predict", images, code=2).stderr
    assert "GTA5_2.ckpt has 19 classes (road,sidewalk" in message
    assert f"info.json 7 ({','.join(names)})" in message
    path.write_text("{")
    assert "info.json: cannot read the classes" in here(TRAIN, "--demo", code=2).stderr


def test_all_mistakes_in_info_json_are_named_at_once(tmp_path):
    """Those of someone who drops a class and forgets the rest."""
    (tmp_path / "info.json").write_text(json.dumps(INFO | {"classes": 18, "label": INFO["label"][:18]}))
    with pytest.raises(UserError, match='"palette" .*"label2train" .*delete it unless you use SYNTHIA'):
        read_classes(tmp_path / "info.json")


@pytest.mark.parametrize("change, named", [
    ({"palette": [[0, 0, 0]]}, "palette"), ({"palette": [[0, 0, 256]] * 19}, "a colour is"),
    ({"palette": [[9, 9, i // 2] for i in range(19)]}, "palette"), ({"void": INFO["palette"][:1]}, "palette"),
    ({"classes": 8}, "classes"), ({"label": ["a, b", *CLASS_NAMES[1:]]}, "label"),
    ({"label2train": [[7, 70]]}, "label2train"), ({"label2train": [[7.0, 0]]}, "label2train"),
    ({"label2train": INFO["label2train"][:9]}, "label2train"),
    ({"label2train": [*INFO["label2train"], [7, 6]]}, "label2train"), ({"subsets": [["x"]]}, "subsets"),
])
def test_mistakes_in_info_json_are_named(tmp_path, change, named):
    (tmp_path / "info.json").write_text(json.dumps(INFO | change))
    with pytest.raises(UserError, match=f'info.json: "?{named}'):
        read_classes(tmp_path / "info.json")


@pytest.fixture
def real(tmp_path):
    """A miniature of both data sets: every id of theirs occurs."""

    def pair(image, label, ids):
        image, label = tmp_path / image, tmp_path / label
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).save(image)
        Image.fromarray(np.resize(np.array(ids, np.uint8), (6, 8))).save(label)

    for n, part in enumerate(("train", "val", "test")):
        pair(f"CamVid/{part}/{n}.png", f"CamVid/{part}annot/{n}.png", range(12))
    for place in ("train/7", "train/9", "val/8"):
        ids = [*range(7), 255]
        pair(f"idd/leftImg8bit/{place}/33_image.jpg", f"idd/gtFine/{place}/33_label.png", ids)
    return tmp_path


def test_the_real_pair_becomes_the_trees_that_the_readers_know(real):
    folder = convert(real / "CamVid", real / "idd", real / "out")
    ablation.add_oracle(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert files == sorted(
        [f"GTA5/{kind}/{n}.png" for kind in ("images", "labels") for n in range(3)]
        + [f"Oracle/{kind}/{name}_33.png" for kind in ("images", "labels") for name in (7, 9)]
        + [f"Cityscapes/{kind}/{place}/{place[-1]}_33_{end}.png" for place in ("train/7", "train/9", "val/8")
           for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))])  # fmt: skip
    with Image.open(real / "idd/leftImg8bit/val/8/33_image.jpg") as image:
        there = Image.open(folder / "Cityscapes/leftImg8bit/val/8/8_33_leftImg8bit.png")
        assert np.array_equal(np.asarray(image), np.asarray(there))

    def classes(path: str, count: int) -> list[str]:
        ids = LABEL_TO_TRAIN[np.asarray(Image.open(folder / path)).ravel()[:count]]
        return [None if i == IGNORE_LABEL else CLASS_NAMES[i] for i in ids]

    far = ["sky", "building", "fence", "road", "sidewalk", "building", "fence", "fence", "car", "person"]
    assert classes("GTA5/labels/0.png", 12) == [*far, "person", None]
    for path in ("Oracle/labels/7_33.png", "Cityscapes/gtFine/val/8/8_33_gtFine_labelIds.png"):
        assert classes(path, 8) == ["road", "sidewalk", "person", "car", "fence", "building", "sky", None]
    assert check_labels(GTA5DataSet(folder / "GTA5")) == check_labels(GTA5DataSet(folder / "Oracle")) == ()
    assert check_labels(cityscapesDataSet(folder / "Cityscapes", "val", labels=True)) == ()
    assert convert("", "", folder) == folder  # once


def test_what_is_wrong_in_the_real_pair_is_named(real):
    def message() -> str:
        with pytest.raises(UserError) as caught:
            convert(real / "CamVid", real / "idd", real / "out")
        assert not (real / "out").exists()
        return str(caught.value)

    label = real / "idd/gtFine/val/8/33_label.png"
    Image.new("L", (8, 6), 7).save(label)
    assert f"{label}: unknown id 7; this data set has 0, 1, 2, 3, 4, 5, 6, 255" in message()
    label.unlink()
    assert f"1 of 6 label files are missing: {label}" in message()
    shutil.rmtree(real / "CamVid" / "test")
    assert f"{real / 'CamVid' / 'test'}: no image" in message()
    assert "belong together" in module("utils.tools.ablation", "--camvid", real / "CamVid", code=2).stderr
