"""Data sets and the training stream, on small files made here."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import DomainSampler, batches
from dataset.transform import IMG_MEAN, LABEL_TO_TRAIN, TRAIN_TO_LABEL
from tests.golden import write_city, write_gta5
from tests.scripts import ROOT, python
from utils.system.errors import UserError
from utils.system.files import read_json, write_json


@pytest.fixture
def gta5(tmp_path):
    return write_gta5(tmp_path / "GTA5", {f"{i:05d}": i for i in (1, 2, 3)}, (192, 105))


@pytest.fixture
def city(tmp_path):
    return write_city(tmp_path / "City", "val", {"000001": 5, "000002": 6}, (204, 102))


def test_label_table_is_the_published_one():
    pairs = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19)))
    assert [LABEL_TO_TRAIN[i] for i in range(256)] == [pairs.get(i, 255) for i in range(256)]
    assert all(TRAIN_TO_LABEL[train] == raw for raw, train in pairs.items())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_gta5_image_and_label(gta5, mode):
    with Image.open(gta5 / "images" / "00002.png") as image:
        changed = image.convert(mode)
    changed.save(gta5 / "images" / "00002.png")
    x, y = GTA5DataSet(gta5, size=(96, 64))[1]
    small = np.asarray(changed.convert("RGB").resize((96, 64), Image.Resampling.BICUBIC), np.float32)
    assert x.dtype == np.float32 and np.array_equal(x, (small[:, :, ::-1] - IMG_MEAN).transpose(2, 0, 1))
    with Image.open(gta5 / "labels" / "00002.png") as label:  # a palette image: its index is the id
        assert label.mode == "P"
        ids = np.asarray(label.resize((96, 64), Image.Resampling.NEAREST))
    assert y.dtype == np.int32 and np.array_equal(y, LABEL_TO_TRAIN[ids])


def test_mirror_flips_both_and_scale_the_image_alone(gta5):
    data = GTA5DataSet(gta5, size=(96, 64))
    (x, y), (x_flipped, y_flipped) = data.read(0), data.read(0, mirror=True)
    assert np.array_equal(x_flipped, x[:, :, ::-1]) and np.array_equal(y_flipped, y[:, ::-1])
    x_large, y_same = data.read(0, scale=1.1)
    assert x_large.shape == (3, 70, 105) and np.array_equal(y, y_same)


@pytest.mark.parametrize("place", ["leftImg8bit", "leftimg8bit", "data/leftimg8bit"])
def test_cityscapes_trees(city, place):
    (city / "data").mkdir()
    (city / "leftImg8bit").rename(city / place)
    (city / "gtFine").rename((city / place).parent / "gtFine")
    data = cityscapesDataSet(city, "val", size=(64, 32), labels=True)
    assert data.names == ["aachen_000001_000019_leftImg8bit", "aachen_000002_000019_leftImg8bit"]
    x, y = data[0]
    assert x.shape == (3, 32, 64) and y.shape == (102, 204) and y.dtype == np.uint8
    assert set(np.unique(y)) <= {*range(19), 255}
    assert len(cityscapesDataSet(city, "val", size=(64, 32))[0]) == 1


def test_user_errors_name_the_file(gta5, city):
    with pytest.raises(UserError, match="GTA5 not found.*nowhere.*--demo"):
        GTA5DataSet("nowhere")
    with pytest.raises(UserError, match="Cityscapes not found.*train"):
        cityscapesDataSet(gta5, "train")
    with pytest.raises(UserError, match="leftImg8bit: no folder vall in it; --set"):
        cityscapesDataSet(city, "vall")
    (city / "gtFine" / "val" / "aachen" / "aachen_000002_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match="1 of 2 label"):
        cityscapesDataSet(city, "val", labels=True)


def test_text_files_are_utf_8_whatever_the_locale_says(tmp_path):
    (tmp_path / "list.txt").write_text("zürich/1.png\n", encoding="utf-8")
    script = """from dataset.file_lists import read_list; from utils.system.files import *
write_json('a.json', {'names': read_list('list.txt', '.')}); read_json('a.json')"""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    python(["-c", script], tmp_path, 0, **ascii_only)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"names": ["zürich/1.png"]}
    path = os.fsdecode("/数据".encode("gbk"))
    write_json(tmp_path / "a.json", {"data_dir": path, "数": 1})
    assert read_json(tmp_path / "a.json") == {"data_dir": path, "数": 1}


def test_a_few_absent_numbers_of_gta5_are_skipped(tmp_path):
    """GTA5 as downloaded lacks 25 pairs; images without a label, or many absent pairs, are errors."""
    root, names, path = tmp_path / "GTA5", [f"{i:05d}" for i in range(1, 301)], tmp_path / "list.txt"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
        for name in names[3:]:
            (root / folder / f"{name}.png").touch()
    assert GTA5DataSet(root).reports == ()
    path.write_text(".png\n".join([*names, ""]))
    split = tmp_path / "split.mat"
    savemat(split, {"trainIds": np.arange(1, 301)})
    for where, chosen in ((path, {"list_path": path}), (split, {"split": split, "subset": "train"})):
        data = GTA5DataSet(root, **chosen)
        assert data.names == names[3:] and len(data.images) == len(data.labels) == 297
        report = f"{where}: 3 of 300 images skipped, as neither image nor label is there: "
        assert data.reports == (report + "00001, 00002, 00003",)
    path.write_text(".png\n".join(["x", *names, ""]))
    with pytest.raises(UserError, match="4 of 301 image files are missing: .*x.png"):
        GTA5DataSet(root, path)  # more than one in a hundred
    (root / "images" / "x.png").touch()
    with pytest.raises(UserError, match="1 of 298 label files are missing: .*x.png"):
        GTA5DataSet(root, path)


def test_two_images_of_one_name_are_an_error(gta5, city, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("00001.png\n00002.png\n00001.png\n")
    with pytest.raises(UserError, match="2 of 3 images share a name.*/00001.png, .*/00001.png;"):
        GTA5DataSet(gta5, names)
    shutil.copytree(city / "leftImg8bit" / "val" / "aachen", city / "leftImg8bit" / "val" / "bonn")
    with pytest.raises(UserError, match="4 of 4 images share a name"):
        cityscapesDataSet(city, "val")


def test_broken_image_is_an_error_that_names_it_never_replaced(gta5):
    path = gta5 / "images" / "00002.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="00002.png: not a readable image"):
        list(batches(GTA5DataSet(gta5, size=(96, 64)), 1, workers=2))


def test_stream_shuffles_each_epoch_and_depends_on_seed_and_position_alone(gta5):
    data = GTA5DataSet(gta5, size=(96, 64))
    stream, later, other = (
        DomainSampler(data, start, 12, 1, [seed, 0], mirror=True, scale=False)
        for start, seed in ((0, 7), (5, 7), (0, 8))
    )
    order = [stream.index(k) for k in range(12)]
    epochs = [order[e : e + 3] for e in (0, 3, 6, 9)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert len(later) == 7
    for k in range(7):
        assert all(np.array_equal(a, b) for a, b in zip(later[k], stream[5 + k]))
    assert [other.index(k) for k in range(12)] != order


def test_random_scale_is_one_for_a_batch_and_has_the_released_frequencies(gta5):
    class Sizes(list):
        def read(self, i, scale, mirror):
            return (scale,)

    stream = DomainSampler(Sizes("abc"), 0, 2000, 2, [1, 0], mirror=False, scale=True)
    scales = np.array([stream[k][0] for k in range(4000)]).reshape(-1, 2)
    assert (scales[:, 0] == scales[:, 1]).all()
    for value, share in ((1.1, 0.3), (0.8, 0.3), (1.0, 0.4)):
        assert abs((scales[:, 0] == value).mean() - share) < 0.04


class Counted:
    """A data set of 300 tiny items that notes which are asked for; those in `broken` are not readable."""

    def __init__(self, *broken: int):
        self.asked, self.broken = [], broken

    def __len__(self):
        return 300

    def __getitem__(self, i):
        self.asked.append(i)
        if i in self.broken:
            raise UserError(f"{i} is broken")
        return np.float32([i]), np.int32([i])


@pytest.mark.parametrize("batch_size", [1, 7])  # 300 = 42 x 7 + 6: the last batch is smaller
def test_all_items_come_in_order_and_few_are_held_ahead(batch_size):
    """Ahead: asked for and not yet handed over. A full-size pair of GTA5 takes 15 MB."""
    data, seen, ahead = Counted(), [], []
    for x, _ in batches(data, batch_size, workers=2):
        assert x.shape == (min(batch_size, 300 - len(seen)), 1)
        seen += x.asnumpy().ravel().tolist()
        ahead.append(len(data.asked) - len(seen))
    assert seen == list(range(300)) and max(ahead) <= 2 + max(2, batch_size)


def test_batches_before_a_broken_item_are_handed_over():
    reader, seen = batches(Counted(40), 2, workers=2), []
    with pytest.raises(UserError, match="40 is broken"):
        for x, _ in reader:
            seen += x.asnumpy().ravel().tolist()
    assert seen == list(range(40))
    data = Counted(0)  # items that are not chosen are not read
    assert [int(x[0, 0]) for x, _ in batches(data, 1, 2, [5, 3, 4])] == [5, 3, 4]
    assert sorted(data.asked) == [3, 4, 5]
