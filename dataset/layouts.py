"""Which data set a folder holds."""

import os
import re
from pathlib import Path

from dataset.cityscapes_dataset import INFIX, TREES
from dataset.file_lists import find_images
from dataset.images import ImageFolder
from utils.system.errors import UserError


def plain_folder(path: str, size: tuple[int, int], option: str) -> ImageFolder | None:
    """Return the images below `path`; None if it is a tree of Cityscapes, or nothing is there.

    UserError as of ImageFolder, or if several sets of Cityscapes are below `path`.
    """
    if not Path(path).exists() or is_cityscapes(path):
        return None
    if Path(path).is_dir():
        check_one_set(Path(path), option)
    return ImageFolder(path, size, option)


def is_cityscapes(path: str) -> bool:
    """Return whether a folder is a tree of Cityscapes."""
    return any((Path(path) / tree).is_dir() for tree in TREES)


def check_one_set(root: Path, option: str) -> None:
    """Raise a UserError if several sets of Cityscapes are below `root`, which is not their tree."""
    pattern = re.compile(rf"(.*?/)?(train|val|test)/.*{INFIX}[^/]*")
    sets = {match[2]: match[1] or "" for match in map(pattern.fullmatch, find_images(root)[0]) if match}
    if len(sets) > 1:
        place, names = Path(os.path.abspath(root / sets[min(sets)])).parent, " and ".join(sorted(sets))
        raise UserError(f"{option} {root}: {names} of Cityscapes are in it, which would all be one set; "
                        f"give {option} {place}, with {TREES[0]} and gtFine in it")
