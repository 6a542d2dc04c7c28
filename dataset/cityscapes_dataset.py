"""Cityscapes (Cordts et al., CVPR 2016): 2,975 / 500 / 1,525 images of streets, 2048x1024."""

from pathlib import Path

import numpy as np

from dataset.file_lists import check_files, few, find_images, list_images
from dataset.labels import open_label, read_label
from dataset.transform import open_image, to_input
from utils.system.errors import UserError

TREES = ("leftImg8bit", "leftimg8bit", "data/leftImg8bit", "data/leftimg8bit")  # where images may lie
INFIX, LABEL_END = "_leftImg8bit", "_gtFine_labelIds.png"


class cityscapesDataSet:
    """leftImg8bit/SET/CITY/*_leftImg8bit.png below `root` or `root`/data; items are (image,) or
    (image, label).

    image: float32 (3, H, W), BGR minus mean, at `size`. label, with `labels=True`: uint8 trainIds (H, W) of
    the label file's own size, 255 = ignored. `names`: "CITY_NNNNNN_NNNNNN_leftImg8bit". Images of one's own
    may be called NAME.png or NAME.jpg, with NAME_gtFine_labelIds.png. `reports` counts what is skipped.
    UserError if the folders, a file of the list, a label or the image of a label is missing.
    """

    reports: tuple[str, ...] = ()
    open_label = staticmethod(open_label)
    warned = False  # of a label whose aspect ratio is not its image's

    def __init__(self, root: str, set: str = "train", list_path: str | None = None,
                 size: tuple[int, int] = (1024, 512), labels: bool = False):
        self.size = size
        folder, truth = find_tree(Path(root), set)
        names, self.reports = list_images(folder, list_path, INFIX, complete=labels)
        self.images = check_files([folder / name for name in names], "Cityscapes image")
        self.names = [path.stem for path in self.images]
        self.labels = None
        if labels:
            # Images of Foggy Cityscapes, NAME_leftImg8bit_foggy_beta_0.02.png, share the label of NAME.
            stems = [Path(name).with_suffix("") for name in names]
            wanted = [truth / stem.parent / (stem.name.partition(INFIX)[0] + LABEL_END) for stem in stems]
            self.labels = check_files(wanted, "Cityscapes label")
            if not list_path:
                check_images_of_labels(truth, self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, ...]:
        """Return item i; `scale` resizes the image alone (as the released code does), `mirror` flips both."""
        image = open_image(self.images[i])
        x = to_input(image, self.size, scale, mirror)
        if self.labels is None:
            return (x,)
        label = read_label(self, i, image.size)
        return x, np.ascontiguousarray(label[:, ::-1]) if mirror else label


def find_tree(root: Path, set: str) -> tuple[Path, Path]:
    """Return the image and the label folder of one set, in any of TREES; UserError if it has none."""
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


def check_images_of_labels(truth: Path, labels: list[Path]) -> None:
    """Raise a UserError if there are more labels in a set than its images have."""
    found = [truth / name for name in find_images(truth)[0] if name.lower().endswith(LABEL_END.lower())]
    if extra := sorted({*map(str, found)} - {*map(str, labels)}):
        raise UserError(f"{len(extra)} of {len(found)} labels have no image: {few(extra)}; get the images, "
                        "or move these labels away")
