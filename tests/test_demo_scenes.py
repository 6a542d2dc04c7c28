"""The embedded demo data: scenes and the folders they are written to."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.demo_scenes import draw_scene, write_demo_data

IDS = {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    (root / ".seed7-stale").mkdir()  # what an interrupted run may leave
    return write_demo_data(root, seed=7, source=3, target=2, val=2)


def files(folder: Path) -> dict[str, int]:
    """Time of modification of each file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("domain", ["source", "target"])
def test_same_seed_same_scene(domain: str) -> None:
    first, second, other = draw_scene(5, domain), draw_scene(5, domain), draw_scene(6, domain)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_domains_share_labels_and_differ_in_look() -> None:
    for seed in range(12):
        source, target = draw_scene(seed, "source"), draw_scene(seed, "target")
        assert np.array_equal(source[1], target[1])
        assert np.abs(source[0].astype(int) - target[0]).mean() > 10


def test_shape_and_type() -> None:
    image, labels = draw_scene(0, "target", 128, 80)
    assert image.shape == (80, 128, 3) and labels.shape == (80, 128)
    assert image.dtype == labels.dtype == np.uint8


def test_unknown_domain() -> None:
    with pytest.raises(ValueError, match="night"):
        draw_scene(0, "night")


def test_every_class_occurs_and_nothing_is_unlabelled() -> None:
    seen: set[int] = set()
    for seed in range(50):
        seen.update(np.unique(draw_scene(seed, "target")[1]).tolist())
    assert seen == IDS


def test_tree(folder: Path) -> None:
    assert folder.name == "seed7"
    expected = {f"GTA5/{kind}/{n:05d}.png" for kind in ("images", "labels") for n in (1, 2, 3)}
    for split in ("train", "val"):
        for n in range(2):
            stem = f"{split}/demo/demo_{n:06d}_000000"
            expected.add(f"Cityscapes/leftImg8bit/{stem}_leftImg8bit.png")
            expected.add(f"Cityscapes/gtFine/{stem}_gtFine_labelIds.png")
    assert set(files(folder)) == expected
    assert {path.name for path in folder.parent.iterdir()} == {"seed7", ".seed7-stale"}


def test_images_and_labels(folder: Path) -> None:
    for name in files(folder):
        image = Image.open(folder / name)
        assert image.size == (192, 96)
        labels = "labels" in name or "gtFine" in name
        assert image.mode == (("P" if "GTA5" in name else "L") if labels else "RGB")
        if labels:
            assert set(np.unique(np.asarray(image)).tolist()) <= IDS


def test_palette_has_the_colours_of_cityscapes(folder: Path) -> None:
    palette = Image.open(folder / "GTA5/labels/00001.png").getpalette()
    assert palette[3 * 7 : 3 * 7 + 3] == [128, 64, 128]  # road
    assert palette[3 * 26 : 3 * 26 + 3] == [0, 0, 142]  # car


def test_no_scene_occurs_twice(folder: Path, tmp_path: Path) -> None:
    neighbour = write_demo_data(tmp_path, seed=8, source=2, target=2, val=2)
    labels = [path for root in (folder, neighbour) for path in root.rglob("*.png") if "gtFine_" in path.name]
    labels += [path for root in (folder, neighbour) for path in (root / "GTA5/labels").iterdir()]
    assert len({np.asarray(Image.open(path)).tobytes() for path in labels}) == len(labels) == 13


def test_second_call_leaves_files_untouched(folder: Path) -> None:
    before = files(folder)
    assert write_demo_data(folder.parent, seed=7, source=3, target=2, val=2) == folder
    assert files(folder) == before


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, *args: object) -> tuple[np.ndarray, np.ndarray]:
        if seed % 1000 == 1:
            raise KeyboardInterrupt
        return draw_scene(seed, *args)

    monkeypatch.setattr("dataset.demo_scenes.draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path, seed=7, source=3, target=2, val=2)
    assert not list(tmp_path.iterdir())
