"""Images without labels, of any size: one file, or what lies below a folder."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.cityscapes_dataset import TREES
from dataset.transform import open_image, to_input
from utils.system.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFolder:
    """`path`, or all .png, .jpg and .jpeg below it, sorted; items are (input,).

    input: float32 (3, H, W), BGR minus mean, at `size`, turned upright (EXIF).
    `names`: paths below `path` without suffix, or all of them with it if two would be alike. What is hidden
    and earlier results of --predict are skipped. UserError, which begins with `option`, if there is no image,
    or labels are among them.
    """

    def __init__(self, path: str, size: tuple[int, int], option: str = "--predict"):
        root, self.size = Path(path), size
        if not root.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        self.images = [root]
        if root.is_dir():
            self.images = sorted(p for p in files_below(root) if p.suffix.lower() in SUFFIXES
                                 and p.is_file() and not is_result(p.relative_to(root)))  # fmt: skip
        if not self.images:
            raise UserError(f"{option} {path}: no image ({', '.join(SUFFIXES)}) in it")
        place = root if root.is_dir() else root.parent
        files, labels = [p.relative_to(place) for p in self.images], {"gtFine", "gtCoarse", "labels"}
        if inside := [file for file in files if labels & set(file.parent.parts)]:
            raise UserError(f"{option} {path}: {place / inside[0]} is in it, a label that would be taken for "
                            "an image; name the folder of the images")
        names = [str(file.with_suffix("")) for file in files]
        self.names = names if len(set(names)) == len(names) else [str(file) for file in files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray]:
        """Item i, resized by `scale` and mirrored as those of the other data sets."""
        return (to_input(open_image(self.images[i], upright=True), self.size, scale, mirror),)

    def with_image(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the input of item i and its image, uint8 RGB (h, w, 3) at its own size, decoded once."""
        image = open_image(self.images[i], upright=True)
        return to_input(image, self.size), np.asarray(image.convert("RGB"))


def plain_folder(path: str, size: tuple[int, int], option: str) -> ImageFolder | None:
    """The images below `path`; None if it is a tree of Cityscapes, or nothing is there."""
    return ImageFolder(path, size, option) if Path(path).exists() and not is_cityscapes(path) else None


def is_cityscapes(path: str) -> bool:
    """Return whether a folder is a tree of Cityscapes."""
    return any((Path(path) / tree).is_dir() for tree in TREES)


def files_below(root: Path) -> Iterator[Path]:
    """Files that are not hidden, also in linked folders; each folder once: links may lead in circles."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, PermissionError) or Path(error.filename).name != "lost+found":
            raise error

    seen, tops = set(), [root]
    for top in tops:  # the linked ones last: what is below `root` itself has its own name
        for folder, folders, files in os.walk(top, onerror=unreadable):
            real = os.path.realpath(folder)
            folders[:] = sorted(name for name in folders if name[0] != ".") if real not in seen else ()
            paths = [Path(folder, name) for name in folders]
            tops += [path for path in paths if path.is_symlink()]
            yield from (Path(folder, name) for name in files if name[0] != "." and real not in seen)
            seen.add(real)


def is_result(path: Path) -> bool:
    """Return whether a file was written by --predict (utils/visual.py), which no one wants to adapt to."""
    pattern = r"(.*/)?predict(_\d+)?/(labelIds|color|overlay)/.*_\3\.png"
    return re.fullmatch(pattern, path.as_posix()) is not None
