"""Labelled images of any kind in images/ and labels/: evaluation and validation on them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.layouts import labelled_images, unlabelled_images
from dataset.transform import LABEL_TO_TRAIN
from tests.golden import synthetic_image, write_city
from tests.scripts import EAGER, EVALUATE, TRAIN, fails, refused, rows_of, run, train_words
from utils import checkpoint
from utils.system.errors import UserError

SIZE = (64, 48)
NAMES = ["00001", "00001.png", "fog/GP/1", "night/GP/1"]
FAST = ["--num-steps", 2, "--save-pred-every", 1, *EAGER]


def write(root, names=NAMES):
    """Write images of several sizes, JPEG below folders and PNG elsewhere, with labels. Returns the root."""
    for k, name in enumerate(names):
        for kind, pixels in zip(("images", "labels"), synthetic_image(k + 1, 90 + 10 * k, 70)):
            path = root / kind / (name + (".jpg" if kind == "images" and "/" in name else ".png"))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that adapts to the images of such a folder and validates on it, its output, and the folder."""
    root = tmp_path_factory.mktemp("layouts")
    pairs = write(root / "pairs")
    argv = train_words(data, root / "run", "--data-dir-target", pairs, "--data-dir-val", pairs, *FAST)
    return root / "run", run(TRAIN, *argv).stdout, pairs


def test_names_in_folders_and_suffixes_in_names_are_no_clash(pairs):
    data = labelled_images(pairs, "--data-dir", SIZE)
    assert data.names == NAMES and data.reports == ()
    for k, (x, y) in enumerate(data):
        assert x.shape == (3, 48, 64) and y.dtype == np.uint8
        assert np.array_equal(y, LABEL_TO_TRAIN[synthetic_image(k + 1, 90 + 10 * k, 70)[1]])
    (pairs / "list.txt").write_text("night/GP/1.jpg\n00001.png.png\n")
    assert labelled_images(pairs, "--data-dir", SIZE, "val", pairs / "list.txt").names == [NAMES[3], NAMES[1]]
    target = unlabelled_images(pairs, "--data-dir-target", SIZE)
    assert target.images == data.images and len(target[0]) == 1
    write_city(pairs, "val", {"000001": 1}, SIZE)
    assert isinstance(labelled_images(pairs, "--data-dir", SIZE), cityscapesDataSet)


@pytest.mark.parametrize("change, message", [
    (lambda root: (root / "labels/00001.png").unlink(), "1 of 4 label files are missing: .*labels/00001.png"),
    (lambda root: (root / "images/00001.png").unlink(), "1 of 4 labels have no image: .*labels/00001.png"),
    (lambda root: (root / "images/a.webp").touch(), "1 of 5 images skipped, as only PNG and JPEG are read"),
    (lambda root: shutil.copy(root / "images/00001.png", root / "images/00001.jpg"), "2 of 5 images share"),
    (lambda root: shutil.rmtree(root / "labels"), "--data-dir .*: no images with labels in it"),
    (lambda root: shutil.rmtree(root), "Cityscapes not found"),
])
def test_what_is_missing_is_named(pairs, change, message):
    change(pairs)
    with pytest.raises(UserError, match=message):
        labelled_images(pairs, "--data-dir", SIZE)


def test_evaluation_of_a_checkpoint(trained, pairs, tmp_path):
    folder, _, _ = trained
    argv = ["--restore-from", folder / "GTA5_2.ckpt", "--data-dir", pairs, "--input-size", "64,48", *EAGER]
    argv += ["--save-path", tmp_path / "r", "--batch-size", 3]
    run(EVALUATE, *argv)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["mIoU"] == pytest.approx(float(rows_of(folder / "miou.csv")[-1]["mIoU"]), abs=1e-6)
    (pairs / "list.txt").write_text("night/GP/1.jpg\n00001.png.png\n")
    more = ["--data-list", pairs / "list.txt", "--adapt-bn", 4, "--save", "--panels", 1, "--classes", 13]
    done = run(EVALUATE, *argv, *more)
    assert f"re-estimated on 4 unlabelled images of {pairs}" in done.stdout and "mIoU_13" in done.stdout
    files = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*.png")}
    kinds, names = ("labelIds", "color"), (NAMES[1], NAMES[3])
    saved = {f"{kind}/{name}_{kind}.png" for kind in kinds for name in names}
    assert files == saved | {"panels/night/GP/1_panel.png", "legend.png"}
    assert "--set is for Cityscapes" in fails(EVALUATE, *argv, "--set", "test")


def test_evaluation_of_a_folder_notices_corrected_labels(trained, pairs, tmp_path):
    folder, _, _ = trained
    argv = ["--restore-from", folder, "--data-dir", pairs, "--input-size", "64,48", *EAGER]
    argv += ["--save-path", tmp_path / "r"]
    assert "0 of them evaluated already" in run(EVALUATE, *argv).stdout
    assert "2 of them evaluated already" in run(EVALUATE, *argv).stdout
    scores = [row["mIoU"] for row in rows_of(tmp_path / "r" / "miou.csv")]
    assert scores == [row["mIoU"] for row in rows_of(folder / "miou.csv")]
    Image.new("L", (120, 70), 7).save(pairs / "labels" / "night" / "GP" / "1.png")
    assert "0 of them evaluated already" in run(EVALUATE, *argv).stdout


def test_training_validates_on_it(trained):
    folder, output, pairs = trained
    assert "4 target images" in output and "no validation" not in output
    assert [row["step"] for row in rows_of(folder / "miou.csv")] == ["1", "2"]
    assert (folder / "GTA5_best.ckpt").exists() and f"--data-dir {pairs} --input-size 64,48" in output


def test_without_adaptation_no_target_is_needed(data, trained, tmp_path):
    argv = train_words(data, tmp_path / "run", "--method", "source", "--data-dir-target", tmp_path / "no")
    output = run(TRAIN, *argv, "--data-dir-val", trained[2], "--num-steps", 1, *EAGER).stdout
    assert "validation after 1 steps" in output and f"--data-dir {trained[2]}" in output
    more = ["--data-dir-val", trained[2] / "images", "--snapshot-dir", tmp_path / "other"]
    message = fails(TRAIN, *argv, *more)
    assert f"--data-dir-val {trained[2] / 'images'}: no images with labels in it" in message
    more[1] = tmp_path / "nowhere"
    assert f"--data-dir-val {more[1]}: no such folder" in fails(TRAIN, *argv, *more)
    assert "no effect with --not-val" in refused("--data-dir-val", trained[2], "--not-val")


def test_the_best_of_another_val_set_begins_anew(data, trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    before = checkpoint.read(str(folder / "GTA5_best.ckpt"))["best_mIoU"]
    assert "begin anew" not in run(TRAIN, "--resume", folder).stdout
    run(TRAIN, "--resume", folder, "--not-val")  # what the rows are of is not forgotten
    output = run(TRAIN, "--resume", folder, "--val", "--data-dir-val", data / "City").stdout
    assert output.count("the val set is not that of the run before: miou.csv and the best begin anew") == 1
    (row,) = rows_of(folder / "miou.csv")
    best = checkpoint.read(str(folder / "GTA5_best.ckpt"))["best_mIoU"]
    assert row["step"] == "2" and best != before
    assert float(best) == pytest.approx(float(row["mIoU"]), rel=1e-6)
    assert checkpoint.read(str(folder / "after_2" / "GTA5_best.ckpt"))["best_mIoU"] == before
    assert len(rows_of(folder / "after_2" / "miou.csv")) == 2
    assert "begin anew" not in run(TRAIN, "--resume", folder).stdout
