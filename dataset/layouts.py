"""Which images a folder holds: a tree of Cityscapes, images/ with labels/, or images alone."""

import os
import re
from pathlib import Path

from dataset.cityscapes_dataset import INFIX, TREES, cityscapesDataSet
from dataset.file_lists import find_images
from dataset.gta5_dataset import GTA5DataSet
from dataset.images import ImageFolder, Images
from dataset.labels import check_labels
from utils.system.errors import UserError


def is_cityscapes(path: str) -> bool:
    """Return whether a folder is a tree of Cityscapes."""
    return any((Path(path) / tree).is_dir() for tree in TREES)


def has_pairs(path: str) -> bool:
    """Return whether a folder has images/ and labels/, GTA5's layout, and is no tree of Cityscapes."""
    return all((Path(path) / name).is_dir() for name in GTA5DataSet.folders) and not is_cityscapes(path)


def labelled_images(path: str, option: str, size: tuple[int, int], set: str = "val",
                    list_path: str | None = None) -> Images:
    """Return images with labels to evaluate on: a set of Cityscapes, or those of images/ and labels/.

    UserError if there are none below `path`, the value of `option`, or if their labels cannot be right.
    """
    if has_pairs(path):
        if set != "val":
            raise UserError(f"{option} {path} has images/ and labels/: --set is for Cityscapes; leave it out")
        data = GTA5DataSet(path, list_path, size, evaluation=True)
    elif option == "--data-dir-val" and not Path(path).exists():
        raise UserError(f"{option} {path}: no such folder")
    elif is_cityscapes(path) or not Path(path).exists():
        data = cityscapesDataSet(path, set, list_path, size, labels=True)
    else:
        raise UserError(f"{option} {path}: no images with labels in it, neither {TREES[0]}/ and gtFine/ of "
                        "Cityscapes nor images/ and labels/")
    data.reports += check_labels(data)
    return data


def unlabelled_images(path: str, option: str, size: tuple[int, int], set: str = "train",
                      list_path: str | None = None) -> Images:
    """Return images to adapt to: a set of Cityscapes, what is in images/ beside labels/, or any images.

    UserError as of the readers, or if several sets of Cityscapes are below `path`, which is not their tree.
    """
    if is_cityscapes(path) or not Path(path).exists():
        return cityscapesDataSet(path, set, list_path, size)
    if set != "train" or list_path:
        raise UserError(f"{path} is a plain folder: --set and --data-list-target are for Cityscapes")
    place = Path(path) / "images" if has_pairs(path) else Path(path)
    if place.is_dir():
        check_one_set(place, option)
    return ImageFolder(place, size, option)


def check_one_set(root: Path, option: str) -> None:
    """Raise a UserError if several sets of Cityscapes are below `root`, which is not their tree."""
    pattern = re.compile(rf"(.*?/)?(train|val|test)/.*{INFIX}[^/]*")
    sets = {match[2]: match[1] or "" for match in map(pattern.fullmatch, find_images(root)[0]) if match}
    if len(sets) > 1:
        place, names = Path(os.path.abspath(root / sets[min(sets)])).parent, " and ".join(sorted(sets))
        raise UserError(f"{option} {root}: {names} of Cityscapes are in it, which would all be one set; "
                        f"give {option} {place}, with {TREES[0]} and gtFine in it")
