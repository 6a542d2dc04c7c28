"""Labels of every kind that people bring: read as what they are, or refused in one line."""

from functools import partial

import mindspore
import numpy as np
import png
import pytest
from PIL import Image

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import INFO
from dataset.gta5_dataset import GTA5DataSet
from dataset.labels import check_labels, open_label
from dataset.transform import LABEL_TO_TRAIN, PALETTE, TRAIN_TO_LABEL, open_image, to_input
from model.CLAN_G import generator
from tests.golden import write_city, write_gta5
from tests.scripts import EAGER, EVALUATE, TRAIN, fails, train_words
from utils.system.errors import UserError
from utils.tools.demo_scenes import write_demo_data
from utils.visual import colourise

GREY = np.repeat(np.arange(256, dtype=np.uint8), 3)


@pytest.fixture
def city(tmp_path):
    return write_city(tmp_path / "City", "val", {f"{i:06d}": 5 + i for i in range(4)}, (204, 102))


def labels_of(city) -> list:
    return sorted((city / "gtFine" / "val" / "aachen").glob("*_labelIds.png"))


def rewrite(city, save) -> tuple[str, ...]:
    """check_labels after save(path, raw ids) has replaced every label."""
    for path in labels_of(city):
        ids = np.asarray(Image.open(path))
        path.unlink()
        save(path, ids)
    return check_labels(cityscapesDataSet(city, "val", labels=True))


def refused(city, save) -> str:
    with pytest.raises(UserError, match=rf"^{labels_of(city)[0]}[^\n]*$") as caught:
        rewrite(city, save)
    return str(caught.value)


def mapped(table):
    return lambda path, ids: Image.fromarray(table[ids]).save(path)


trainIds = mapped(LABEL_TO_TRAIN)


def with_palette(path, ids, palette) -> None:
    label = Image.fromarray(ids)
    label.putpalette(palette.tobytes())
    label.save(path)


def optimised(path, ids) -> None:
    """Save a grey label as tools do that make PNGs smaller: what is seen stays, the indices are others."""
    values, indices = np.unique(ids, return_inverse=True)
    with_palette(path, indices.reshape(ids.shape).astype(np.uint8), np.repeat(values, 3).astype(np.uint8))


def test_valid_labels_of_every_kind_pass(city, tmp_path):
    """Of Cityscapes, GTA5 and the demo. SYNTHIA: test_sources; CamVid, IDD and other classes: test_own."""
    assert rewrite(city, mapped(np.arange(256, dtype=np.uint8))) == ()
    data = cityscapesDataSet(city, "val", labels=True)
    expected = [label for _, label in data]
    own = colourise(LABEL_TO_TRAIN)
    palettes = own, 255 - own, GREY, GREY // 255 * 255, np.where(np.arange(768) < 40, GREY, 255)
    void = np.uint8([255 if t == 255 else i for i, t in enumerate(LABEL_TO_TRAIN)])
    for save in (optimised, mapped(void), *(partial(with_palette, palette=palette) for palette in palettes)):
        assert rewrite(city, save) == ()
        assert all(np.array_equal(label, there) for (_, label), there in zip(data, expected))
        write_city(city, "val", {f"{i:06d}": 5 + i for i in range(4)}, (204, 102))
    # Highway scenes and small palettes: few of the classes, and four bits per index.
    assert rewrite(city, mapped(np.resize(np.uint8([7, 11, 0]), 256))) == ()
    rewrite(city, lambda path, ids: with_palette(path, ids % 12, own[:12]))
    assert set(np.unique(data[0][1])) <= {*LABEL_TO_TRAIN[:12]}
    all_ids = np.resize(np.arange(35, dtype=np.uint8), (102, 204))  # of GTA5: 34 is the license plate
    assert rewrite(city, lambda path, ids: with_palette(path, all_ids, own)) == ()
    demo = write_demo_data(tmp_path / "demo", 1, 3, 1, 3)
    assert check_labels(GTA5DataSet(demo / "GTA5")) == ()
    assert check_labels(cityscapesDataSet(demo / "Cityscapes", "val", labels=True)) == ()


@pytest.mark.parametrize("named, save", [
    ("JPEG", lambda path, ids: Image.fromarray(ids).save(path, "JPEG")),
    ("4-bit", lambda path, ids: png.from_array(ids % 12, "L;4").save(path)),
    ("mode 1", lambda path, ids: Image.fromarray(ids > 20).save(path)),
    ("16-bit", lambda path, ids: Image.fromarray(ids.astype(np.uint16)).save(path)),
    ("mode LA", lambda path, ids: Image.fromarray(ids).convert("LA").save(path)),
])
def test_files_that_do_not_hold_ids_are_refused(city, named, save):
    message = refused(city, save)
    assert named in message and "expected a PNG of 8-bit ids" in message


def test_every_id_and_colour_has_to_be_in_info_json(city):
    path = labels_of(city)[2]
    ids = np.array(Image.open(path))
    ids[0, :2] = 77, 255  # 255 is always ignored
    Image.fromarray(ids).save(path)
    with pytest.raises(UserError, match=f'{path}: id 77 is not in "label2train" of .*info.json'):
        open_label(path)
    rgb = colourise(LABEL_TO_TRAIN[ids])
    rgb[50, 60] = 1, 2, 3
    Image.fromarray(rgb).save(path)
    with pytest.raises(UserError, match=f"{path}: colour \\[1, 2, 3\\] is neither in"):
        open_label(path)


def test_trainIds_are_noticed(city):
    message = refused(city, trainIds)
    assert "look like trainIds" in message and '"label2train": [[0, 0], [1, 1], …]' in message
    road = TRAIN_TO_LABEL.copy()  # converted back; for what is mostly sky in these images
    road[10] = 7
    assert rewrite(city, mapped(road)) == ()
    plus_1 = LABEL_TO_TRAIN + np.uint8(1)  # for tools that need 0 for what is ignored
    assert "look like trainIds" in refused(city, mapped(plus_1))
    few = np.resize(np.uint8([0, 8, 1, 2]), 256)  # as trainIds: road, vegetation, sidewalk, building
    (line,) = rewrite(city, mapped(few))
    assert str(labels_of(city)[0]) in line and "if these are trainIds" in line


def test_palettes_of_the_classes_with_other_indices_are_refused(city):
    def quantised(path, ids):
        Image.fromarray(colourise(LABEL_TO_TRAIN[ids])).quantize().save(path)

    for save in (lambda path, ids: with_palette(path, LABEL_TO_TRAIN[ids], PALETTE), quantised):
        message = refused(city, save)
        assert "colours of the palette are classes" in message and "indices are not" in message


def test_labels_without_any_class_are_refused(city, tmp_path):
    message = refused(city, mapped(np.zeros(256, np.uint8)))  # Cityscapes' test set
    assert "no pixel of any class in 4 labels, only ids [0]" in message
    # One label in 200 is enough.
    source = write_gta5(tmp_path / "GTA5", {f"{i:05d}": i for i in range(60)}, (24, 16))
    for path in sorted((source / "labels").iterdir()):
        Image.fromarray(np.uint8([[7 if path.stem == "00001" else 0]])).save(path)
    assert check_labels(GTA5DataSet(source)) == ()


def test_colours_are_read_as_the_classes_of_info_json(city):
    data = cityscapesDataSet(city, "val", labels=True)
    expected = [label for _, label in data]
    ignored = np.random.default_rng(0).random((102, 204)) < 0.2

    def save(path, ids):
        rgb = colourise(LABEL_TO_TRAIN[ids])
        if path == data.labels[0]:
            rgb[ignored] = np.resize(INFO["void"], (ignored.sum(), 3))
        else:
            rgb = np.dstack([rgb, np.where(ignored, 0, 255).astype(np.uint8)])
        Image.fromarray(rgb).save(path)

    assert rewrite(city, save) == ()
    for (_, label), there in zip(data, expected):
        assert np.array_equal(label, np.where(ignored, 255, there))


def test_an_aspect_ratio_that_differs_is_told_once(city, tmp_path, capsys):
    source = write_gta5(tmp_path / "GTA5", {"1": 1, "2": 2}, (192, 104))
    for data in (GTA5DataSet(source, size=(96, 64)), cityscapesDataSet(city, "val", labels=True)):
        for cropped, told in ((0, 0), (20, 1)):
            for path in data.labels:
                with Image.open(path) as label:
                    small = label.resize((label.width // 2, label.height // 2), Image.Resampling.NEAREST)
                    small.crop((0, 0, small.width - cropped, small.height)).save(path)
            assert len([data[i] for i in range(2)]) == 2
            output = capsys.readouterr().out
            assert output.count("another aspect ratio") == told and (str(data.labels[0]) in output) == told


@pytest.mark.parametrize("mode", ["RGB;16", "L;16"])
def test_images_of_16_bits_are_refused(tmp_path, mode):
    """Cameras of 12 bits: of 16 bits Pillow keeps the upper 8, which are nearly black."""
    channels = len(mode) - 3
    png.from_array(np.full((8, 8 * channels), 4095, np.uint16), mode).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: an image of mode .* and 16 bits per channel"):
        to_input(open_image(tmp_path / "a.png"), (8, 8))


def test_both_scripts_check_their_labels(data, tmp_path):
    """Source and val labels at the start of a training, those of the set in an evaluation."""
    source = write_gta5(tmp_path / "GTA5", {"1": 1}, (64, 36))
    city = write_city(tmp_path / "City", "val", {"000001": 5}, (64, 32))
    for path in (*labels_of(city), source / "labels" / "1.png"):
        trainIds(path, np.asarray(Image.open(path)))
    argv = train_words(data, tmp_path / "run", "--num-steps", 1, *EAGER, "--method", "source")
    mindspore.save_checkpoint(generator("small"), str(tmp_path / "a.ckpt"))
    for message in (fails(TRAIN, *argv, "--data-dir-target", city), fails(TRAIN, *argv, "--data-dir", source),
                    fails(EVALUATE, "--restore-from", tmp_path / "a.ckpt", "--data-dir", city)):
        assert "look like trainIds" in message
    assert not (tmp_path / "run").exists()
