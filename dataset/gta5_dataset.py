"""GTA5 (Richter et al., ECCV 2016): 24,966 labelled pictures of a game, 1914x1052."""

import warnings
from pathlib import Path

import numpy as np

from dataset.transform import check_files, open_image, read_list, to_input, to_trainIds
from utils.errors import UserError


class GTA5DataSet:
    """images/NNNNN.png with labels/NNNNN.png below `root`; item i is (picture, label).

    picture: float32 (3, H, W), BGR minus mean. label: int32 (H, W), trainIds, 255 = ignored.
    UserError if the folders, a file of the list or a label is missing.
    """

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 720)):
        root = Path(root)
        self.size = size
        if not (root / "images").is_dir() or not (root / "labels").is_dir():
            raise UserError(
                f"GTA5 not found: no folders {root / 'images'} and {root / 'labels'} (--data-dir); "
                "it can be had at https://download.visinf.tu-darmstadt.de/data/from_games/ — or try --demo, "
                "which needs no data"
            )
        self.names = read_list(
            list_path, sorted(p.name for p in (root / "images").glob("*.png")), root / "images"
        )
        self.pictures = [root / "images" / name for name in self.names]
        self.labels = [root / "labels" / name for name in self.names]
        check_files(self.pictures, "GTA5 picture")
        check_files(self.labels, "GTA5 label")
        self._warned = False

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Item i; `scale` resizes the picture alone (as the released code does), `mirror` flips both."""
        width, height = self.size
        image, ids = open_image(self.pictures[i]), open_image(self.labels[i])
        if image.size != ids.size and not self._warned:
            self._warned = True  # the data set has a few such pairs: both are resized, so the pair is of use
            warnings.warn(
                f"{self.labels[i]}: the label's size differs from the picture's; both are resized "
                "(further cases are not reported)",
                stacklevel=2,
            )
        picture = to_input(image, (int(width * scale), int(height * scale)))
        label = to_trainIds(ids, self.size).astype(np.int32)
        if mirror:
            picture, label = picture[:, :, ::-1], label[:, ::-1]
        return np.ascontiguousarray(picture), np.ascontiguousarray(label)
