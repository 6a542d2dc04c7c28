"""Loading and preprocessing of images and labels, as the authors' code does it, with Pillow."""

import io
import os
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.classes import IGNORE_LABEL, INFO
from utils.errors import UserError

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


def few(names: list[str], count: int = 3) -> str:
    """The first of some names, for an error message."""
    return ", ".join(names[:count]) + " …" * (len(names) > count)


def read_list(path: str | None, found: list[str], where: Path) -> list[str]:
    """The names in a list file, or without one all `found` below `where`.

    UserError if there are none, or two images of one name: results would overwrite each other.
    """
    if path is None:
        names = found
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin it with a byte-order mark
            names = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this list ({error})") from None
    if not names:
        raise UserError(f"{path or where}: no images in it")
    stems = Counter(Path(name).stem for name in names)
    duplicates = [name for name in names if stems[Path(name).stem] > 1]
    if duplicates:
        raise UserError(
            f"{path or where}: {len(duplicates)} of {len(names)} images share a name with another: "
            + few(sorted(duplicates, key=lambda name: Path(name).stem), 4)
        )
    return names


def png_files(folder: Path, pattern: str = "*.png") -> list[str]:
    """The files below `folder` that fit, sorted, without hidden ones: macOS adds a ._NAME.png to each.

    PermissionError for a folder that may not be read; Path.glob would leave it out.
    """
    places, (*levels, name) = [folder] if folder.is_dir() else [], pattern.split("/")
    for _ in levels:
        below = [path for place in places for path in place.iterdir()]
        places = [path for path in below if path.is_dir() and path.name[0] != "."]
    files = [place / file for place in places for file in os.listdir(place) if file[0] != "."]
    return sorted(str(path.relative_to(folder)) for path in files if fnmatch(path.name, name))


def missing_files(paths: list[Path]) -> list[Path]:
    """Those of the files that do not exist; every folder is listed once."""
    folders: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        folders[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    return [path for path in paths if path.name not in folders[path.parent]]


def check_files(paths: list[Path], what: str) -> None:
    """One UserError with the count and the first few of the files that do not exist."""
    missing = list(map(str, missing_files(paths)))
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} {what} files are missing: {few(missing)}")
