"""Predictions as images, in the ids and colours of Cityscapes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.classes import CLASS_NAMES, IGNORE_LABEL
from dataset.transform import PALETTE, TRAIN_TO_LABEL
from utils.system.files import atomic

COLOURS = np.zeros((256, 3), np.uint8)  # by trainId; black for all that is no class
COLOURS[: len(PALETTE)] = PALETTE
CLASSES = {name: tuple(map(int, colour)) for name, colour in zip(CLASS_NAMES, PALETTE)}
ERRORS = {"correct": (215, 215, 215), "wrong": (214, 39, 40), "ignored": (0, 0, 0)}
PANEL_WIDTH = 480  # of each image in a panel


def colourise(trainIds: np.ndarray) -> np.ndarray:
    """Return trainIds (H, W), 255 = ignored, as RGB uint8 (H, W, 3)."""
    return COLOURS[trainIds]


def save_prediction(folder: Path, name: str, trainIds: np.ndarray, image: np.ndarray | None = None) -> None:
    """Write labelIds/<name>_labelIds.png, raw ids for the official evaluator, and color/<name>_color.png.

    With the image, RGB uint8 of the same size, write overlay/<name>_overlay.png, the mean of both, as well.
    """
    kinds = {"labelIds": TRAIN_TO_LABEL[trainIds], "color": colourise(trainIds)}
    if image is not None:
        kinds["overlay"] = ((image.astype(np.uint16) + kinds["color"]) // 2).astype(np.uint8)
    for kind, pixels in kinds.items():
        with atomic(folder / kind / f"{name}_{kind}.png") as temporary:
            Image.fromarray(pixels).save(temporary, compress_level=1)  # half the time of the default, 6


def save_legend(folder: Path) -> None:
    """Write legend.png, which explains color/ and overlay/, next to them."""
    with atomic(folder / "legend.png") as temporary:
        legend(CLASSES).save(temporary)


def heatmap(values: np.ndarray) -> np.ndarray:
    """Return values (H, W) in [0, 1] as RGB uint8 (H, W, 3): dark blue (0), red, light yellow (1)."""
    stops = np.array([(8, 8, 48), (90, 20, 110), (190, 50, 85), (245, 135, 45), (252, 253, 190)], float)
    x = np.clip(values, 0, 1) * (len(stops) - 1)
    return np.stack([np.interp(x, range(len(stops)), stops[:, c]) for c in range(3)], -1).astype(np.uint8)


def panels(
    rows: list[list[np.ndarray]], captions: list[str], top: float, height: int, entries: dict[str, tuple]
) -> Image.Image:
    """Return a figure of images, uint8 RGB each, under one caption per column, above a legend of `entries`.

    Each image is shown `height` pixels high. The last column shows the `heatmap` of values from 0 to `top`,
    which a colour bar next to it explains.
    """
    gap, width = 6, round(height * rows[0][0].shape[1] / rows[0][0].shape[0])
    bar, head = (len(captions) * (width + gap) // n for n in (13, 36))
    below = legend(entries, gap + len(captions) * (width + gap) + bar)
    figure = Image.new("RGB", (below.width, head + len(rows) * (height + gap) + below.height), "white")
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(size=bar / 4)
    for c, caption in enumerate(captions):
        draw.text((gap + c * (width + gap) + width / 2, head / 2), caption, "black", font, anchor="mm")
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            figure.paste(image, (gap + c * (width + gap), head + r * (height + gap)))
    bottom = head + len(rows) * (height + gap) - gap
    x, middle = below.width - bar, (head + bottom) // 2
    ramp = heatmap(np.linspace(1, 0, bottom - head)[:, None].repeat(bar // 5, 1))
    figure.paste(Image.fromarray(ramp), (x, head))
    for value, y, anchor in ((top, head, "lt"), (top / 2, middle, "lm"), (0, bottom, "lb")):
        draw.text((x + bar // 4, y), f"{value:.2g}", "black", font, anchor=anchor)
    figure.paste(below, (0, bottom + gap))
    return figure


def legend(entries: dict[str, tuple], width: int = 1000) -> Image.Image:
    """Return names next to their colours, in columns; as large as in a figure that is 1,000 pixels wide."""
    size = width / 1000
    font = ImageFont.load_default(size=16 * size)
    columns = int(max(1, width / (max(map(font.getlength, entries)) + 40 * size)))
    figure = Image.new("RGB", (width, round(28 * size * -(-len(entries) // columns))), "white")
    draw = ImageDraw.Draw(figure)
    for k, (name, colour) in enumerate(entries.items()):
        x, y = (k % columns * 1000 / columns + 6) * size, (k // columns * 28 + 4) * size
        draw.rectangle((x, y, x + 20 * size, y + 20 * size), colour, "black")
        draw.text((x + 26 * size, y + 10 * size), name, "black", font, anchor="lm")
    return figure


def panel(image: Image.Image, prediction: np.ndarray, truth: np.ndarray, M: np.ndarray) -> Image.Image:
    """Return a figure of an image, its prediction, ground truth, errors and alignment map, with a legend.

    `prediction`, `truth`: trainIds (H, W); `M`: float32 (h, w).
    """
    top = max(float(np.quantile(M, 0.995)), 1e-6)
    errors = np.where(truth == IGNORE_LABEL, 2, prediction != truth)  # places in ERRORS
    cells = {
        "image": np.asarray(image.convert("RGB").resize(M.shape[::-1], Image.Resampling.BICUBIC)),
        "prediction": colourise(prediction),
        "ground truth": colourise(truth),
        "errors": np.array(list(ERRORS.values()), np.uint8)[errors],
        "alignment map M": heatmap(M / top),
    }
    return panels([list(cells.values())], list(cells), top, M.shape[0], {**CLASSES, **ERRORS})
