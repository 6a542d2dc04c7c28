"""SYNTHIA-RAND-CITYSCAPES (Ros et al., CVPR 2016): 9,400 labelled images of a rendered city, 1280x760."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.classes import IGNORE_LABEL, INFO, INFO_PATH
from dataset.gta5_dataset import GTA5DataSet
from dataset.transform import TRAIN_TO_LABEL, open_image
from utils.system.errors import UserError

try:
    from pyspng import load
except ImportError:  # only SYNTHIA needs it
    load = None

# SYNTHIA's id -> the raw id of its class, or one that is ignored; the pairs are AdaptSegNet's.
SYNTHIA_TO_LABEL = np.full(2**16, TRAIN_TO_LABEL[IGNORE_LABEL])
for _id, _train_id in INFO.get("synthia2train", []):
    SYNTHIA_TO_LABEL[_id] = TRAIN_TO_LABEL[_train_id]


def open_synthia_label(path: Path) -> Image.Image:
    """Return a label as an image of raw ids, mode L; see `class_ids`."""
    return Image.fromarray(SYNTHIA_TO_LABEL[class_ids(path)])


class SYNTHIADataSet(GTA5DataSet):
    """RGB/NAME.png with GT/LABELS/NAME.png below `root`, otherwise as GTA5; UserError without pyspng, too."""

    what, folders = "SYNTHIA", ("RGB", "GT/LABELS")
    home = "https://synthia-dataset.net/downloads/, SYNTHIA-RAND-CITYSCAPES"
    open_label = staticmethod(open_synthia_label)

    def __init__(self, root: str, list_path: str | None = None, size: tuple[int, int] = (1280, 760)):
        if not INFO.get("synthia2train"):
            raise UserError(f'{INFO_PATH}: --source synthia needs "synthia2train", pairs [id, trainId]')
        if not load:
            raise UserError("SYNTHIA's labels have 16 bits a channel, which Pillow cannot read: "
                            "pip install pyspng")
        super().__init__(root, list_path, size)


def class_ids(path: Path) -> np.ndarray:
    """Return the classes uint16 (H, W) of a label: the first channel of a PNG of 16-bit RGB.

    The second channel numbers the instances. Pillow keeps only the upper 8 bits, which are 0, and pyspng does
    not notice most damaged bits: so Pillow checks the file, and pyspng reads it.
    """
    open_image(path)  # UserError if it is corrupt or huge
    try:
        pixels = load(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable label ({error}); copy it again from the data set") from None
    if pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] < 3:
        raise UserError(f"{path}: not a label of SYNTHIA; expected 16-bit RGB, as in its GT/LABELS")
    return pixels[..., 0]
