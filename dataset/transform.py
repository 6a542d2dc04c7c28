"""Loading and preprocessing of images with Pillow, as in the authors' code, and the tables of info.json."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.classes import IGNORE_LABEL, INFO
from utils.system.errors import UserError

PALETTE = np.array(INFO["palette"], np.uint8)  # RGB by trainId
IMG_MEAN = np.array((104.00698793, 116.66876762, 122.67891434), np.float32)  # BGR, of ImageNet
MAX_PIXELS = 2**26  # 32 images of Cityscapes

LABEL_TO_TRAIN = np.full(256, IGNORE_LABEL, np.uint8)  # raw id (labelIds) -> trainId
TRAIN_TO_LABEL = np.full(256, IGNORE_LABEL, np.uint8)  # and back
# Reversed, so that the first raw id of a class wins in TRAIN_TO_LABEL.
for _id, _train_id in reversed(INFO["label2train"]):
    if _train_id != IGNORE_LABEL:
        LABEL_TO_TRAIN[_id] = _train_id
        TRAIN_TO_LABEL[_train_id] = _id
# An id that is ignored: 255, unless info.json makes that a class.
TRAIN_TO_LABEL[IGNORE_LABEL] = max(np.flatnonzero(LABEL_TO_TRAIN == IGNORE_LABEL), default=IGNORE_LABEL)


def open_image(path: Path, upright: bool = False) -> Image.Image:
    """Return a decoded PNG or JPEG; UserError names the file if it is missing, truncated or no such image.

    With `upright` the image is turned as its EXIF orientation says. Images with labels are not turned: labels
    belong to the pixels as they are stored.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        # Other formats of Pillow start programs or hold many images. The file is read into memory first,
        # because a reader of parts allocates whatever length a damaged header claims.
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}: {image.width} x {image.height} pixels are too many; make it smaller")
        image.load()
        if upright:
            with suppress(Exception):  # a damaged EXIF block is ignored, as image viewers do
                ImageOps.exif_transpose(image, in_place=True)
        image.filename = str(path)
        # PNG's header has its bit depth there, which Pillow does not tell: of 16 bits it keeps the upper 8.
        image.info["bits"] = content[24] if image.format == "PNG" else 8
        return image
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image; make it PNG or JPEG or get a complete copy") from None
    except Exception as error:  # Pillow raises many kinds for a damaged file, even IndexError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); get a complete copy of it") from None


def to_input(
    image: Image.Image, size: tuple[int, int], scale: float = 1.0, mirror: bool = False
) -> np.ndarray:
    """Return an image as float32 (3, H, W), BGR minus IMG_MEAN, bicubic to `scale` times size (W, H)."""
    bits = image.info["bits"]
    if bits > 8 or image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise UserError(f"{image.filename}: an image of mode {image.mode} and {bits} bits per channel; "
                        "convert it to 8-bit RGB")
    scaled = int(size[0] * scale), int(size[1] * scale)
    bands = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC).split()[::-1]
    x = np.stack([np.asarray(band, np.float32) - mean for band, mean in zip(bands, IMG_MEAN)])
    return np.ascontiguousarray(x[:, :, ::-1]) if mirror else x
