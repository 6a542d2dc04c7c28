"""Label files: PNGs of raw ids or of the classes' colours, and whether they are what info.json says."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.classes import IGNORE_LABEL, INFO, INFO_PATH, NUM_CLASSES
from dataset.pipeline import evenly_spaced_indices
from dataset.transform import LABEL_TO_TRAIN, PALETTE, TRAIN_TO_LABEL, open_image
from utils.system.errors import UserError

RAW_IDS = {IGNORE_LABEL, *(i for i, _ in INFO["label2train"])}  # what a label may hold
GREYS = {(i, i, i) for i in RAW_IDS}
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
CLASS_COLOURS = {tuple(colour): trainId for trainId, colour in enumerate(PALETTE.tolist())}
VOID_COLOURS = {tuple(colour): IGNORE_LABEL for colour in (BLACK, *INFO.get("void", []))}
# Colours as numbers of 24 bits, sorted, and the raw id of each; behind them a number for alpha 0.
TRANSPARENT = 2**24
_trainIds = {r | g << 8 | b << 16: t for (r, g, b), t in (VOID_COLOURS | CLASS_COLOURS).items()}
COLOURS = np.array([*sorted(_trainIds), TRANSPARENT], np.uint32)
IDS_OF_COLOURS = TRAIN_TO_LABEL[[*(_trainIds[colour] for colour in sorted(_trainIds)), IGNORE_LABEL]]


# ---------------------------------------------------------------------------------------------- every label


def read_label(data, i: int, image_size: tuple[int, int], size: tuple[int, int] | None = None) -> np.ndarray:
    """Return label i of a data set as trainIds uint8 (H, W), nearest to size (W, H), 255 = ignored.

    Both are resized, so their sizes may differ; the first label with another aspect ratio gets a warning.
    """
    label, (width, height) = data.open_label(data.labels[i]), image_size
    if abs(label.width * height / (label.height * width) - 1) > 0.01 and not data.warned:
        data.warned = True
        warnings.warn(
            f"{data.labels[i]}: the label, {label.width}x{label.height}, has another aspect ratio than its "
            f"image, {width}x{height}: was one of them cropped? (further cases are not reported)",
            stacklevel=3,
        )
    if size is not None:
        label = label.resize(size, Image.Resampling.NEAREST)
    return np.array(label.point(LABEL_TO_TRAIN.tolist()))


def open_label(path: Path) -> Image.Image:
    """Return a label as an image of raw ids: mode L, or P where the index is the id.

    Colours (RGB, RGBA) become the ids of their classes. A palette of raw ids in grey is a grey label whose
    file was made smaller: its ids are the colours. UserError if the file holds anything else: JPEG changes
    ids, and Pillow scales grey of fewer than 8 bits.
    """
    image = open_image(path)
    bits = image.info["bits"]
    fits = image.mode == "P" or bits == 8 and image.mode in ("L", "RGB", "RGBA")
    if image.format != "PNG" or not fits:
        kind = f"{bits}-bit PNG of mode {image.mode}" if image.format == "PNG" else image.format
        raise UserError(f"{path}: a label that is a {kind}; expected a PNG of 8-bit ids (grey or palette) "
                        "or of 8-bit RGB colours")  # fmt: skip
    if image.mode in ("RGB", "RGBA"):
        return ids_of_colours(image)
    colours = set(palette_of(image)) - {BLACK, WHITE}  # a palette of these alone is to look at
    if colours and colours <= GREYS:
        image = image.convert("L")
    unknown = [i for i, count in enumerate(image.histogram()) if count and i not in RAW_IDS]
    if unknown:
        raise UserError(f'{path}: id {unknown[0]} is not in "label2train" of {INFO_PATH}; convert the label '
                        f"or add the id there; [{unknown[0]}, 255] ignores it")  # fmt: skip
    return image


def palette_of(image: Image.Image) -> list[tuple[int, int, int]]:
    """Return the colours of a palette by index; none for other images."""
    values = image.getpalette() or [] if image.mode == "P" else []
    return list(zip(values[::3], values[1::3], values[2::3]))


def ids_of_colours(image: Image.Image) -> Image.Image:
    """Return colours of info.json as raw ids, mode L; UserError names the file and a colour it does not have.

    Black, "void" colours and what is transparent are ignored, unless black is the colour of a class.
    """
    rgba = np.asarray(image.convert("RGBA")).view("<u4")[..., 0]
    colours = rgba & 0xFFFFFF
    colours[rgba >> 24 == 0] = TRANSPARENT
    place = np.searchsorted(COLOURS, colours)
    if (unknown := colours[COLOURS[place] != colours]).size:
        r, g, b, _ = int(unknown[0]).to_bytes(4, "little")
        raise UserError(f'{image.filename}: colour [{r}, {g}, {b}] is neither in "palette" nor in "void" of '
                        f"{INFO_PATH}; add it there, or convert the label to ids")  # fmt: skip
    return Image.fromarray(IDS_OF_COLOURS[place])


# ---------------------------------------------------------------------------- a sample of them at the start


def check_labels(data) -> tuple[str, ...]:
    """Return lines for the log about a sample of the labels; UserError if they contradict info.json.

    The sample is 16 evenly spaced labels, or up to 200 if these have no pixel of any class. It is no error
    that most classes do not occur.
    """
    where = f"{data.labels[0]}" + f" and {len(data) - 1} more" * (len(data) > 1)
    for sample in (16, 200):
        counts, colours = np.zeros(256, np.int64), set()  # pixels by raw id; (index, colour) of palettes
        for i in evenly_spaced_indices(len(data), sample):
            label = data.open_label(data.labels[i])
            pixels = label.histogram()
            counts += pixels
            colours |= {(k, colour) for k, colour in enumerate(palette_of(label)) if pixels[k]}
        check_palettes(where, colours)
        if counts[LABEL_TO_TRAIN != IGNORE_LABEL].any():
            return check_ids(where, counts)
    ids = ", ".join(map(str, np.flatnonzero(counts)))
    count = min(sample, len(data))
    raise UserError(f"{where}: no pixel of any class in {count} labels, only id {ids}; take a set with "
                    f"labels (test sets have none), use --not-val, or see {INFO_PATH}")


def check_palettes(where: str, colours: set[tuple[int, tuple]]) -> None:
    """Raise UserError if the colours of palettes are classes, but (nearly) no index is an id of its class."""
    pairs = [(k, CLASS_COLOURS[c]) for k, c in colours if c in CLASS_COLOURS and c not in (BLACK, WHITE)]
    known = {c for _, c in colours} <= {*CLASS_COLOURS, *VOID_COLOURS, WHITE}
    right = sum(LABEL_TO_TRAIN[k] == trainId for k, trainId in pairs)
    if known and len({trainId for _, trainId in pairs}) > 1 and 4 * right < len(pairs):
        raise UserError(f"{where}: the colours of the palette are classes of info.json, but its indices are "
                        "not their ids; save the labels as RGB colours or as ids")  # fmt: skip


def check_ids(where: str, counts: np.ndarray) -> tuple[str, ...]:
    """Return a line if pixel counts by raw id may be those of trainIds; UserError if they surely are.

    trainIds, or trainIds + 1, do not exceed the number of classes, and info.json ignores many of them.
    """
    ids, pixels = np.flatnonzero(counts[:IGNORE_LABEL]), counts[:IGNORE_LABEL].sum()
    ignored = ids[LABEL_TO_TRAIN[ids] == IGNORE_LABEL]
    if not ignored.any() or ids.max() > NUM_CLASSES:
        return ()
    share = counts[ignored].sum() / pixels
    remedy = (f"convert them to raw ids (trainId 0 is {TRAIN_TO_LABEL[0]}); if these are the ids, write "
              f'"label2train": [[0, 0], [1, 1], …] in {INFO_PATH}')  # fmt: skip
    if 2 * len(ids) >= NUM_CLASSES and share > 0.5:
        raise UserError(f"{where}: these labels look like trainIds: info.json ignores {share:.0%} of their "
                        f"pixels; {remedy}")  # fmt: skip
    if len(ids) >= max(4, 2 * (len(ids) - len(ignored))) and counts[ignored[ignored > 0]].sum() > pixels / 4:
        found = ", ".join(map(str, ids))
        return (f"{where}: only ids {found}, and info.json ignores {share:.0%} of their pixels; if these are "
                f"trainIds, {remedy}",)  # fmt: skip
    return ()
