"""Label files: PNGs of raw ids or of the classes' colours, and whether they are what info.json says."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.classes import IGNORE_LABEL, INFO, INFO_PATH, NUM_CLASSES
from dataset.file_lists import evenly_spaced_indices
from dataset.transform import LABEL_TO_TRAIN, PALETTE, TRAIN_TO_LABEL, open_image
from utils.system.errors import UserError

RAW_IDS = {IGNORE_LABEL, *(i for i, _ in INFO["label2train"])}  # what a label may hold
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# Colour -> trainId. Black is ignored unless it is the colour of a class.
CLASS_COLOURS = {tuple(colour): trainId for trainId, colour in enumerate(PALETTE.tolist())}
COLOURS = {tuple(colour): IGNORE_LABEL for colour in (BLACK, *INFO.get("void", []))} | CLASS_COLOURS


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
        raise UserError(f"{path}: a label that is a {bits}-bit {image.format} of mode {image.mode}; expected "
                        "a PNG of 8-bit ids (grey or palette) or of 8-bit RGB colours")
    if image.mode in ("RGB", "RGBA"):
        return ids_of_colours(image)
    colours = set(palette_of(image)) - {BLACK, WHITE}  # a palette of these alone is to look at
    if colours and colours <= {(i, i, i) for i in RAW_IDS}:
        image = image.convert("L")
    unknown = [i for i, count in enumerate(image.histogram()) if count and i not in RAW_IDS]
    if unknown:
        raise UserError(f'{path}: id {unknown[0]} is not in "label2train" of {INFO_PATH}; convert the label '
                        f"or add the id there; [{unknown[0]}, 255] ignores it")
    return image


def palette_of(image: Image.Image) -> list[tuple[int, int, int]]:
    """Return the colours of a palette by index; none for other images."""
    values = image.getpalette() or []
    return list(zip(values[::3], values[1::3], values[2::3]))


def ids_of_colours(image: Image.Image) -> Image.Image:
    """Return colours of info.json as raw ids, mode L; UserError names the file and a colour it does not have.

    Black, "void" colours and what is transparent are ignored, unless black is the colour of a class.
    """
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint32)
    packed = rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2]
    ids = np.full(packed.shape, -1, np.int16)
    for (r, g, b), trainId in COLOURS.items():
        ids[packed == (r << 16 | g << 8 | b)] = TRAIN_TO_LABEL[trainId]
    ids[rgba[..., 3] == 0] = TRAIN_TO_LABEL[IGNORE_LABEL]
    if (unknown := rgba[ids < 0]).size:
        raise UserError(f'{image.filename}: colour {unknown[0, :3].tolist()} is neither in "palette" nor in '
                        f'"void" of {INFO_PATH}; add it there, or convert the label to ids')
    return Image.fromarray(ids.astype(np.uint8))


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
    ids, count = np.flatnonzero(counts).tolist(), min(sample, len(data))
    raise UserError(f"{where}: no pixel of any class in {count} labels, only ids {ids}; take a set with "
                    f"labels (test sets have none: --predict, in training --not-val), or see {INFO_PATH}")


def check_palettes(where: str, colours: set[tuple[int, tuple]]) -> None:
    """Raise UserError if the colours of palettes are classes, but (nearly) no index is an id of its class."""
    known = {colour for _, colour in colours} <= {*COLOURS, WHITE}
    pairs = [(k, CLASS_COLOURS[c]) for k, c in colours if c in CLASS_COLOURS and c not in (BLACK, WHITE)]
    right = sum(LABEL_TO_TRAIN[k] == trainId for k, trainId in pairs)
    if known and len({trainId for _, trainId in pairs}) > 1 and 4 * right < len(pairs):
        raise UserError(f"{where}: the colours of the palette are classes of info.json, but its indices are "
                        "not their ids; save the labels as RGB colours or as ids")


def check_ids(where: str, counts: np.ndarray) -> tuple[str, ...]:
    """Return a line if pixel counts by raw id may be those of trainIds; UserError if they surely are.

    trainIds, or trainIds + 1, do not exceed the number of classes, and info.json ignores many of them.
    """
    ids, pixels = np.flatnonzero(counts[:IGNORE_LABEL]), counts[:IGNORE_LABEL].sum()
    ignored = ids[LABEL_TO_TRAIN[ids] == IGNORE_LABEL]
    if not ignored.any() or ids.max() > NUM_CLASSES:
        return ()
    share = counts[ignored].sum() / pixels
    found = f"{where}: info.json ignores {share:.0%} of the pixels, whose ids are {ids.tolist()}"
    remedy = (f"convert them to raw ids (trainId 0 is {TRAIN_TO_LABEL[0]}); if these are the ids, write "
              f'"label2train": [[0, 0], [1, 1], …] in {INFO_PATH}')
    if 2 * len(ids) >= NUM_CLASSES and share > 0.5:
        raise UserError(f"{found}: these labels look like trainIds; {remedy}")
    if len(ids) >= max(4, 2 * (len(ids) - len(ignored))) and counts[ignored[ignored > 0]].sum() > pixels / 4:
        return (f"{found}; if these are trainIds, {remedy}",)
    return ()
