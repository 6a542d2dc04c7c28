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
    gap, head, bar, columns = 6, 28, 64, 8
    width = round(height * rows[0][0].shape[1] / rows[0][0].shape[0])
    figure_width = gap + len(captions) * (width + gap) + bar
    below = -(-len(entries) // columns) * 28
    figure = Image.new("RGB", (figure_width, head + len(rows) * (height + gap) + below + gap), "white")
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(size=16)
    for c, caption in enumerate(captions):
        draw.text((gap + c * (width + gap) + width / 2, head / 2), caption, "black", font, anchor="mm")
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            figure.paste(image, (gap + c * (width + gap), head + r * (height + gap)))
    bottom = head + len(rows) * (height + gap) - gap
    colour_bar(figure, (figure_width - bar, head), bottom - head, top)
    for k, (name, colour) in enumerate(entries.items()):
        x = gap + k % columns * ((figure_width - gap) // columns)
        y = bottom + gap + k // columns * 28 + 4
        draw.rectangle((x, y, x + 20, y + 20), colour, "black")
        draw.text((x + 26, y + 10), name, "black", font, anchor="lm")
    return figure


def colour_bar(figure: Image.Image, place: tuple[int, int], height: int, top: float) -> None:
    """Draw the colours of `heatmap` at `place`, 64 pixels wide; at their side `top`, half of it and 0."""
    draw, font, (x, y) = ImageDraw.Draw(figure), ImageFont.load_default(size=16), place
    ramp = heatmap(np.linspace(1, 0, height)[:, None].repeat(14, 1))
    figure.paste(Image.fromarray(ramp), place)
    for value, at, anchor in ((top, y, "lt"), (top / 2, (2 * y + height) // 2, "lm"), (0, y + height, "lb")):
        draw.text((x + 18, at), f"{value:.2g}", "black", font, anchor=anchor)


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
