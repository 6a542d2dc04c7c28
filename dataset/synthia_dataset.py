"""SYNTHIA-RAND-CITYSCAPES (Ros et al., CVPR 2016): 9,400 labelled pictures of a drawn city, 1280x760."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.transform import IGNORE_LABEL, check_files, open_image, read_list, to_input
from utils.errors import UserError

SYNTHIA_TO_TRAIN = np.full(2**16, IGNORE_LABEL, np.uint8)  # SYNTHIA's id -> trainId, as AdaptSegNet has it
SYNTHIA_TO_TRAIN[[3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11]] = range(19)


class SYNTHIADataSet:
    """RGB/NAME.png with GT/LABELS/NAME.png below `root`; item i is (picture, label).

    picture: float32 (3, H, W), BGR minus mean. label: int32 (H, W), trainIds, 255 = ignored.
    UserError if the folders, a file of the list, a label or the package pyspng is missing.
    """

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 760)):
        pictures, labels = Path(root) / "RGB", Path(root) / "GT" / "LABELS"
        self.size = size
        if not pictures.is_dir() or not labels.is_dir():
            raise UserError(
                f"SYNTHIA not found: no folders {pictures} and {labels} (--data-dir); it is "
                "SYNTHIA-RAND-CITYSCAPES of https://synthia-dataset.net/downloads/ — or try --demo, which "
                "needs no data"
            )
        self.names = read_list(list_path, sorted(p.name for p in pictures.glob("*.png")), pictures)
        self.pictures = [pictures / name for name in self.names]
        self.labels = [labels / name for name in self.names]
        check_files(self.pictures, "SYNTHIA picture")
        check_files(self.labels, "SYNTHIA label")
        png_reader()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(i)

    def read(self, i: int, scale: float = 1.0, mirror: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Item i; `scale` resizes the picture alone (as the released code does), `mirror` flips both."""
        width, height = self.size
        image, path = open_image(self.pictures[i]), self.labels[i]
        trainIds = Image.fromarray(SYNTHIA_TO_TRAIN[class_ids(path)])
        if image.size != trainIds.size:
            raise UserError(f"{path}: its size is not its picture's; copy both again from the data set")
        picture = to_input(image, (int(width * scale), int(height * scale)))
        label = np.asarray(trainIds.resize(self.size, Image.Resampling.NEAREST), np.int32)
        if mirror:
            picture, label = picture[:, :, ::-1], label[:, ::-1]
        return np.ascontiguousarray(picture), np.ascontiguousarray(label)


def class_ids(path: Path) -> np.ndarray:
    """The first channel of a PNG of 16-bit RGB -> uint16 (H, W): classes; the second numbers the instances.

    Pillow keeps the upper 8 bits of 16, which are 0 for all classes; it checks the file, pyspng reads it.
    """
    open_image(path)  # UserError if it is broken or huge
    try:
        pixels = png_reader()(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable label ({error}); copy it again from the data set") from None
    if pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] < 3:
        raise UserError(f"{path}: not a label of SYNTHIA; expected 16-bit RGB, as in its GT/LABELS")
    return pixels[..., 0]


def png_reader():
    """pyspng.load, which reads PNGs of 16 bits exactly; UserError says how to get it."""
    try:
        from pyspng import load
    except ImportError:
        raise UserError(
            "SYNTHIA's labels have 16 bits a channel, which Pillow cannot read; this can: pip install pyspng"
        ) from None
    return load
