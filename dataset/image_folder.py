"""Images without labels, of any size: one file, or what lies below a folder."""

import re
from pathlib import Path

import numpy as np

from dataset.transform import open_image, to_input
from utils.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFolder:
    """`path`, or all .png, .jpg and .jpeg below it, sorted; items are inputs, `image(i)` is item i itself.

    input: float32 (3, H, W), BGR minus mean, at `size`. image: uint8 RGB (h, w, 3) at its own size, which
    is read when it is needed, so that memory stays bounded. Both are turned upright (EXIF).
    `names`: paths below `path` without suffix, or all of them with it if two would be alike. Hidden files and
    earlier results in `results`/predict, predict_1, … are skipped. UserError if there is no image.
    """

    def __init__(self, path: str, size: tuple[int, int], results: str):
        root, self.size = Path(path), size
        if not root.exists():
            raise UserError(f"--predict {path}: no such file or folder")
        self.images = [root]
        if root.is_dir():
            found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            self.images = sorted(p for p in found if p.name[0] != "." and not is_result(p, results))
        if not self.images:
            raise UserError(f"--predict {path}: no image ({', '.join(SUFFIXES)}) in it")
        files = [p.relative_to(root if root.is_dir() else root.parent) for p in self.images]
        names = [str(file.with_suffix("")) for file in files]
        self.names = names if len(set(names)) == len(names) else [str(file) for file in files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> np.ndarray:
        return to_input(open_image(self.images[i], upright=True), self.size)

    def image(self, i: int) -> np.ndarray:
        return np.asarray(open_image(self.images[i], upright=True).convert("RGB"))


def is_result(path: Path, results: str) -> bool:
    """Return whether a file is a result of --predict that lies in the folder `results`."""
    place = Path(results).resolve()
    return any(
        re.fullmatch(r"predict(_\d+)?", parent.name) and parent.parent == place
        for parent in path.resolve().parents
    )
