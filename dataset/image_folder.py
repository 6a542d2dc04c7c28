"""Images without labels, of any size: one file, or all below a folder."""

import os
import re
from pathlib import Path

import numpy as np

from dataset.cityscapes_dataset import INFIX, TREES
from dataset.file_lists import SUFFIXES, check_no_labels, find_images, unread
from dataset.transform import open_image, to_input
from utils.system.errors import UserError


class ImageFolder:
    """`path`, or all PNG and JPEG files below it, sorted; items are (input,).

    input: float32 (3, H, W), BGR minus mean, at `size`, turned upright (EXIF). `names`: paths below `path`
    without suffix, or all of them with it if two would be alike. Earlier results of --predict are skipped;
    `reports` counts the images of formats that are not read. UserError if there is no image, if labels or
    several sets of Cityscapes are among them, or links lead nowhere.
    """

    def __init__(self, path: str, size: tuple[int, int], option: str = "--predict"):
        root, self.size, self.reports = Path(path), size, ()
        if not root.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        place, files = root.parent, [root.name]
        if root.is_dir():
            found, others = find_images(root)
            place, files = root, [file for file in found if not is_result(file)]
            self.reports = (unread(root, others, files),) if others else ()
        if not files:
            lines = "".join(f"; {line}" for line in self.reports)
            raise UserError(f"{option} {path}: no image ({', '.join(SUFFIXES)}) in it{lines}")
        if option != "--predict":
            check_one_set(root, files, option)
        check_no_labels(place, files, f"{option} {path}")
        self.images = [place / file for file in files]
        names = [os.path.splitext(file)[0] for file in files]
        self.names = names if len(set(names)) == len(names) else files

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray]:
        """Return item i, resized by `scale` and mirrored as those of the other data sets."""
        return (to_input(open_image(self.images[i], upright=True), self.size, scale, mirror),)

    def with_image(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the input of item i and its image, uint8 RGB (h, w, 3) at its own size, decoded once."""
        image = open_image(self.images[i], upright=True)
        return to_input(image, self.size), np.asarray(image.convert("RGB"))


def plain_folder(path: str, size: tuple[int, int], option: str) -> ImageFolder | None:
    """Return the images below `path`; None if it is a tree of Cityscapes, or nothing is there."""
    return ImageFolder(path, size, option) if Path(path).exists() and not is_cityscapes(path) else None


def is_cityscapes(path: str) -> bool:
    """Return whether a folder is a tree of Cityscapes."""
    return any((Path(path) / tree).is_dir() for tree in TREES)


def check_one_set(root: Path, files: list[str], option: str) -> None:
    """Raise a UserError if several sets of Cityscapes are below `root`, which is not their tree."""
    sets = {}
    for file in files:
        match = re.match(r"(?:(.*?)/)?(train|val|test)/", Path(file).as_posix())
        if match and INFIX in Path(file).stem:
            sets[match[2]] = Path(os.path.abspath(root / (match[1] or "")))
    if len(sets) > 1:
        place, names = sets[min(sets)], " and ".join(sorted(sets))
        known = place.name in {Path(tree).name for tree in TREES}
        rename = "" if known else f"rename {place} to {TREES[0]} and "
        raise UserError(f"{option} {root}: {names} of Cityscapes are in it, which would all be one set; "
                        f"{rename}give {option} {place.parent}, with gtFine in it")


def is_result(file: str) -> bool:
    """Return whether a file was written by --predict (utils/visual.py), which no one wants to adapt to."""
    pattern = r"(.*/)?predict(_\d+)?/(labelIds|color|overlay)/.*_\3\.png"
    return re.fullmatch(pattern, Path(file).as_posix()) is not None
