"""Images without labels, of any size: one file, or all below a folder."""

import os
import re
from pathlib import Path

import numpy as np

from dataset.cityscapes_dataset import INFIX, TREES
from dataset.file_lists import check_no_labels, find_images
from dataset.images import Images
from dataset.transform import open_image, to_input
from utils.system.errors import UserError


class ImageFolder(Images):
    """`path`, or all PNG and JPEG files below it, sorted; items are (input,), turned upright (EXIF).

    `names`: paths below `path` without suffix, or all of them with it if two would be alike. UserError if
    there is no image, if labels are among them or, unless `option` is --predict, several sets of Cityscapes.
    """

    upright, labels = True, None

    def __init__(self, path: str, size: tuple[int, int], option: str = "--predict"):
        root, self.size = Path(path), size
        if not root.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        if root.is_dir():
            files, self.reports = find_images(root)
            if option != "--predict":
                check_one_set(root, files, option)
            check_no_labels(root, files)
        else:
            root, files = root.parent, [root.name]
        self.images = [root / file for file in files]
        names = [os.path.splitext(file)[0] for file in files]
        self.names = names if len(set(names)) == len(names) else files

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
    pattern = re.compile(rf"(.*?/)?(train|val|test)/.*{INFIX}[^/]*")
    sets = {match[2]: match[1] or "" for match in map(pattern.fullmatch, files) if match}
    if len(sets) > 1:
        place, names = Path(os.path.abspath(root / sets[min(sets)])), " and ".join(sorted(sets))
        rename = "" if place.name.lower() == "leftimg8bit" else f"rename {place} to {TREES[0]} and "
        raise UserError(f"{option} {root}: {names} of Cityscapes are in it, which would all be one set; "
                        f"{rename}give {option} {place.parent}, with gtFine in it")
