"""A chart of horizontal bars, for the ablation and the class centre distances."""

from PIL import Image, ImageDraw, ImageFont


def bars(title: str, labels: list[str], series: dict[str, list[tuple[float, float | None]]]) -> Image.Image:
    """Return horizontal bars from 0: for each label one bar of each series.

    `series` holds (value, standard deviation or None) for each label.
    """
    colours, width, head, slot, gap = ("#2f5d8a", "#e0a458", "#7a9e7e"), 560, 64, 20, 10
    font = ImageFont.load_default(size=16)
    left = round(max(font.getlength(label) for label in labels)) + 2 * gap
    group = slot * len(series) + gap
    top = max((value + (sd or 0) for values in series.values() for value, sd in values), default=1) or 1
    figure = Image.new("RGB", (left + width + 150, head + group * len(labels) + gap), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((gap, gap), title, "black", font)
    x = gap
    for name, colour in zip(series, colours):
        draw.rectangle((x, 40, x + 14, 54), colour)
        draw.text((x + 20, 47), name, "black", font, anchor="lm")
        x += 20 + draw.textlength(name, font) + 30
    for n, label in enumerate(labels):
        y = head + n * group
        draw.text((left - gap, y + (group - gap) / 2), label, "black", font, anchor="rm")
        for k, (values, colour) in enumerate(zip(series.values(), colours)):
            (value, sd), middle = values[n], y + (k + 0.5) * slot
            low, end, high = (left + width * max(value + s * (sd or 0), 0) / top for s in (-1, 0, 1))
            draw.rectangle((left, middle - 8, end, middle + 8), colour)
            if sd is not None:
                draw.line((low, middle, high, middle), "black", 2)
                for x in (low, high):
                    draw.line((x, middle - 4, x, middle + 4), "black", 2)
            text = f"{value:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
            draw.text((high + 8, middle), text, "black", font, anchor="lm")
    draw.line((left, head, left, head + group * len(labels) - gap), "black", 1)
    return figure
