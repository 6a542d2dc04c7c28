"""The embedded demo data: scenes and the folders they are written to."""

import numpy as np
import pytest
from PIL import Image

from utils.tools.demo_scenes import draw_scene, write_demo_data

IDS = {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    (root / ".seed7-stale").mkdir()  # what an interrupted run may leave
    return write_demo_data(root, seed=7, source=3, target=2, val=2)


def test_a_seed_is_one_scene_that_has_one_look_in_each_domain():
    for seed in range(12):
        scenes = [draw_scene(seed, domain, 128, 80) for domain in 2 * ("source", "target")]
        (source, target, *again), (labels, *others) = zip(*scenes)
        assert source.shape == (80, 128, 3) and labels.shape == (80, 128)
        assert np.array_equal((source, target), again) and all(np.array_equal(labels, x) for x in others)
        assert np.abs(source.astype(int) - target).mean() > 10


def test_every_class_occurs_and_nothing_is_unlabelled():
    assert set(np.unique([draw_scene(seed, "target")[1] for seed in range(50)])) == IDS


def test_the_tree_and_its_images_and_labels_which_a_second_call_leaves_alone(folder):
    expected = {f"GTA5/{kind}/{n:05d}.png" for kind in ("images", "labels") for n in (1, 2, 3)}
    for stem in (f"{split}/demo/demo_{n:06d}_000000" for split in ("train", "val") for n in range(2)):
        expected.add(f"Cityscapes/leftImg8bit/{stem}_leftImg8bit.png")
        expected.add(f"Cityscapes/gtFine/{stem}_gtFine_labelIds.png")
    times = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert set(times) == expected
    assert {path.name for path in folder.parent.iterdir()} == {"seed7", ".seed7-stale"}
    for name in expected:
        image, labels = Image.open(folder / name), "labels" in name or "gtFine" in name
        assert image.size == (192, 96)
        assert image.mode == (("P" if "GTA5" in name else "L") if labels else "RGB")
    palette = Image.open(folder / "GTA5/labels/00001.png").getpalette()
    # Road and car in the colours of Cityscapes.
    assert palette[3 * 7 : 3 * 7 + 3] == [128, 64, 128] and palette[3 * 26 : 3 * 26 + 3] == [0, 0, 142]
    assert write_demo_data(folder.parent, seed=7, source=3, target=2, val=2) == folder
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


def test_no_scene_occurs_twice(folder, tmp_path):
    neighbour = write_demo_data(tmp_path, seed=8, source=2, target=2, val=2)
    labels = [path for root in (folder, neighbour) for path in root.rglob("*.png")
              if path.parent.name == "labels" or "gtFine_" in path.name]
    assert len({np.asarray(Image.open(path)).tobytes() for path in labels}) == len(labels) == 13
