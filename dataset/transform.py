"""Loading and preprocessing of images and labels, as the authors' code does it, with Pillow."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.classes import IGNORE_LABEL, INFO
from utils.system.errors import UserError

PALETTE = np.array(INFO["palette"], np.uint8)  # RGB by trainId
IMG_MEAN = np.array((104.00698793, 116.66876762, 122.67891434), np.float32)  # BGR, of ImageNet
MAX_PIXELS = 2**26  # 32 images of Cityscapes

LABEL_TO_TRAIN = np.full(256, IGNORE_LABEL, np.uint8)  # raw id (labelIds) -> trainId
TRAIN_TO_LABEL = np.zeros(256, np.uint8)  # and back; 255 -> 0, "unlabelled"
GREY_IDS = {(i, i, i) for i, _ in INFO["label2train"]}  # raw ids as colours
for _id, _train_id in reversed(INFO["label2train"]):  # of several ids of a class the first is its own
    if _train_id != IGNORE_LABEL:
        LABEL_TO_TRAIN[_id] = _train_id
        TRAIN_TO_LABEL[_train_id] = _id


def open_image(path: Path, upright: bool = False) -> Image.Image:
    """A decoded PNG or JPEG; UserError names the file if it is missing, truncated or no such image.

    With `upright` it is turned as its EXIF orientation says. Never where there are labels: they belong to the
    pixels as they are stored.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        # Of Pillow's formats only these two: others start programs or hold many images.
        # From memory: read in parts, a file would allocate whatever length its header claims.
        image = Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}: {image.width} x {image.height} pixels are too many; make it smaller")
        image.load()
        if upright:
            turn_upright(image)
        image.filename = str(path)
        return image
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image; make it PNG or JPEG or get a complete copy") from None
    except Exception as error:  # a damaged file can trip any check of Pillow, down to an IndexError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); get a complete copy of it") from None


def turn_upright(image: Image.Image) -> None:
    """Turn an image as its EXIF orientation says. A damaged block says nothing, as for image viewers."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # of Pillow's parser, of any kind
        pass


def to_input(
    image: Image.Image, size: tuple[int, int], scale: float = 1.0, mirror: bool = False
) -> np.ndarray:
    """An image -> float32 (3, H, W): bicubic to `scale` times size (W, H), mirrored, BGR, minus IMG_MEAN."""
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise UserError(f"{image.filename}: an image of mode {image.mode}; expected 8-bit RGB")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    scaled = int(size[0] * scale), int(size[1] * scale)
    bands = rgb.resize(scaled, Image.Resampling.BICUBIC).split()[::-1]
    x = np.stack([np.asarray(band, np.float32) - mean for band, mean in zip(bands, IMG_MEAN)])
    return np.ascontiguousarray(x[:, :, ::-1]) if mirror else x


def to_trainIds(image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image of raw ids (grey, or palette indices) -> trainIds uint8 (H, W), nearest to size (W, H).

    A palette of raw ids in grey is a grey label whose file was made smaller: its ids are the colours.
    """
    if image.mode not in ("L", "P"):
        raise UserError(f"{image.filename}: a label of mode {image.mode}; expected 8-bit ids, mode L or P")
    colours = set(image.palette.colors if image.palette else ()) - {(0, 0, 0), (255, 255, 255)}
    if image.mode == "P" and colours and colours <= GREY_IDS:  # not black and white alone, to look at
        image = image.convert("L")
    if size is not None:
        image = image.resize(size, Image.Resampling.NEAREST)
    return LABEL_TO_TRAIN[np.asarray(image)]
