"""Cityscapes (Cordts et al., CVPR 2016): 2,975 / 500 / 1,525 images of streets, 2048x1024."""

from pathlib import Path

import numpy as np

from dataset.file_lists import check_files, png_files, read_list
from dataset.labels import open_label, read_label
from dataset.transform import open_image, to_input
from utils.system.errors import UserError

TREES = ("leftImg8bit", "leftimg8bit", "data/leftImg8bit", "data/leftimg8bit")  # where images may lie


class cityscapesDataSet:
    """leftImg8bit/SET/CITY/*_leftImg8bit.png below `root` or `root`/data; items are (image,) or
    (image, label).

    image: float32 (3, H, W), BGR minus mean, at `size`. label, with `labels=True`: uint8 trainIds (H, W) of
    the label file's own size, 255 = ignored. `names`: "CITY_NNNNNN_NNNNNN_leftImg8bit". UserError if the
    folders, a file of the list or a label is missing.
    """

    reports: tuple[str, ...] = ()
    open_label = staticmethod(open_label)
    warned = False  # of a label whose aspect ratio is not its image's

    def __init__(self, root: str, set: str = "train", list_path: str | None = None,
                 size: tuple[int, int] = (1024, 512), labels: bool = False):
        self.size = size
        folder, truth = find_tree(Path(root), set)
        paths = read_list(list_path, png_files(folder, "*/*.png"), folder)
        self.images = [folder / path for path in paths]
        self.names = [path.stem for path in self.images]
        check_files(self.images, "Cityscapes image")
        self.labels = None
        if labels:
            self.labels = [
                truth / path.parent.name / f"{path.stem[: -len('_leftImg8bit')]}_gtFine_labelIds.png"
                for path in self.images
            ]
            check_files(self.labels, "Cityscapes label")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, ...]:
        """Item i; `scale` resizes the image alone (as the released code does), `mirror` flips both."""
        image = open_image(self.images[i])
        x = to_input(image, self.size, scale, mirror)
        if self.labels is None:
            return (x,)
        label = read_label(self, i, image.size)
        return x, np.ascontiguousarray(label[:, ::-1]) if mirror else label


def find_tree(root: Path, set: str) -> tuple[Path, Path]:
    """The image and the label folder of one set, in the official tree or the one with data/leftimg8bit."""
    places = [root / name for name in TREES]
    for place in places:
        if (place / set).is_dir():
            return place / set, place.parent / "gtFine" / set
    for place in places:
        if place.is_dir():
            raise UserError(f"{place}: no folder {set} in it; --set names another, or it is incomplete; "
                            "a training with --not-val needs no val")
    raise UserError(
        f"Cityscapes not found: no folder {root / 'leftImg8bit' / set} or "
        f"{root / 'data' / 'leftimg8bit' / set} (--data-dir-target in training, --data-dir in evaluation); "
        "download: https://www.cityscapes-dataset.com/ — or try CLAN_train_gta5_2_city.py --demo, "
        "which needs no data"
    )
