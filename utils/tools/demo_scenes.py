"""Procedural street scenes for the demo: small synthetic counterparts of GTA5 and of Cityscapes.

Both domains have the same rules of layout (camera, street, houses, traffic) and differ only in appearance:
colours, light, haze, blur, noise. Lengths are metres: x to the right of the camera, y above the ground, z
ahead. Shapes are painted from far to near on a canvas of twice the size of the image.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from dataset.transform import LABEL_TO_TRAIN
from utils.system import interrupt
from utils.system.files import atomic_folder
from utils.visual import colourise

Colour = np.ndarray | tuple[float, float, float]
Point = tuple[float, float]
Plan = list[tuple]  # of (z, painter, x, further arguments of the painter)

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY, PERSON, RIDER = 21, 22, 23, 24, 25
CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 26, 27, 28, 31, 32, 33
SHADOW = -1  # not a class: shapes with this label darken the ground
SIDES = (-1, 1)  # left and right of the street
SCALE, FAR = 2, 127  # size of the canvas over that of the image; greatest distance it records
SEED_STRIDE, SPLIT_STRIDE = 1_000_000, 100_000  # of scenes' seeds, from one data set or split to the next

DOMAINS = ("source", "target")
PALETTE = {  # the colours of a class in the source domain and in the target domain
    ROAD: ("48484e 545254", "686868 767472"), SIDEWALK: ("ac9e8a bcb09e", "848282 8e8a8c"),
    BUILDING: ("ba7856 d6b282 a05440 e2ceaa 786870", "807c76 96928a 6c6864 a49c8e 887a70"),
    WALL: ("967660 b09678", "706e68 807c76"), FENCE: ("5c4634 3c3c42", "545a56 6e706e"),
    POLE: ("42403e 5c5850", "686a68 7c7c7a"), LIGHT: ("cea81e 28282c", "40463c 343834"),
    SIGN: ("d21e22 1854be f0c81e", "a84646 46608c b6b6b2"),
    VEGETATION: ("3a8022 54962c 286428", "46543a 546246 3c4a38"), TERRAIN: ("969642 7a9038", "6a7456 74765c"),
    SKY: ("5898e6 6eaaf0 4682d6", "d6dcdc e4e8e6 c6d0d4"), RIDER: ("dc781e 1e78aa", "564c46 404c5c"),
    PERSON: ("be2832 2846aa e6dcc8 323238", "464248 60504e 3c485c 787470"),
    CAR: ("be181e 183caa ececec 1e1e22 dcb428", "3c3e44 96989a 606468 b8b8b8 5c3836"),
    TRUCK: ("d67828 3c6eaa dcdcd6", "a8a6a0 687076 8c7868"), BUS: ("e0aa14 1e8c5a", "a0966e 78867e"),
    TRAIN: ("3c5aa0 be3c32", "787460 6c727c"), MOTORCYCLE: ("282428 a01e1e", "3a3a3c 544642"),
    BICYCLE: ("282832 1e6e8c", "424446 585854"),
}  # fmt: skip
LOOK = {  # the other constants of appearance; jitter: how far the colours of single objects vary
    "glass": np.array([(70, 100, 140), (78, 88, 88)]), "window": np.array([(50, 70, 100), (86, 92, 92)]),
    "marking": ((240, 236, 220), (186, 186, 182)), "tyre": ((22, 22, 24), (42, 44, 44)), "jitter": (18, 10),
    "facade_shade": (0.30, 0.10), "texture": (1.0, 0.7), "ground_shadow": (0.55, 0.12), "haze": (0.0, 0.5),
    "saturation": (1.15, 0.85), "contrast": (1.12, 0.92), "brightness": (4, -6), "gamma": (1.0, 1.05),
    "cast": ((1.05, 1.0, 0.94), (0.95, 1.03, 0.97)), "vignette": (0.0, 0.18), "blur": (0.0, 0.7),
    "noise": (2.0, 6.0),
}  # fmt: skip
HAZE_COLOUR = np.float32((206, 212, 208))
TEXTURE = np.zeros((256, 3), np.float32)  # amplitude of fine, medium and coarse variations in brightness
TEXTURE[[ROAD, SIDEWALK, BUILDING, WALL]] = (5, 2, 5), (5, 7, 4), (4, 5, 5), (6, 8, 5)
TEXTURE[[FENCE, VEGETATION, TERRAIN, SKY]] = (6, 6, 4), (16, 20, 10), (10, 14, 10), (0, 0, 2)
TEXTURE /= 100


def faded(colour: Sequence[float], saturation: float) -> Colour:
    """Move a colour towards the grey of its own brightness."""
    amount = min(1.0, saturation)
    return amount * np.array(colour) + (1 - amount) * sum(colour) / 3


class Canvas:
    """An unfinished image, its pinhole camera, and the random generators of layout and of appearance."""

    def __init__(self, seed: int, domain: str, width: int, height: int) -> None:
        self.width, self.height, column = width, height, DOMAINS.index(domain)
        self.look = SimpleNamespace(**{name: pair[column] for name, pair in LOOK.items()})
        self.palette = {label: [np.array([*bytes.fromhex(code)]) for code in pair[column].split()]
                        for label, pair in PALETTE.items()}
        self.layout, self.appearance = default_rng([seed, 1]), default_rng([seed, 2])
        self.focal, self.eye = 0.85 * width, self.layout.uniform(1.3, 1.7)
        self.vanishing = width * self.layout.uniform(0.40, 0.60), height * self.layout.uniform(0.38, 0.47)
        # colours, label + 256 * (distance in half metres), strength of shadow
        self.images = [Image.new(mode, (SCALE * width, SCALE * height)) for mode in ("RGB", "I", "L")]
        self.pens = [ImageDraw.Draw(image) for image in self.images]

    def project(self, x: float, y: float, z: float) -> Point:
        """Return the pixel where the camera sees a point."""
        return self.vanishing[0] + self.focal * x / z, self.vanishing[1] + self.focal * (self.eye - y) / z

    def colour(self, label: int, pick: float | None = None) -> Colour:
        """Return a jittered colour of a class: a random one of its palette, or the one at `pick` (0 to 1)."""
        choices, pick = self.palette[label], self.layout.random() if pick is None else pick
        jitter = self.look.jitter * self.appearance.uniform(-1, 1, 4)
        return choices[min(int(pick * len(choices)), len(choices) - 1)] + jitter[3] + jitter[:3] / 2

    def draw(self, shape: str, label: int, colour: Colour, z: float, *points: Point,
             thickness: float = 0) -> None:
        """Paint a polygon, a line, or a rectangle or ellipse given by two opposite corners."""
        scaled = [(SCALE * u, SCALE * v) for u, v in points]
        if shape in ("rectangle", "ellipse"):  # the upper left corner comes first
            scaled = [tuple(map(min, *scaled)), tuple(map(max, *scaled))]
        width = {"width": max(SCALE, round(SCALE * thickness))} if shape == "line" else {}
        ink = tuple(min(255, max(0, int(value))) for value in colour)
        inks = (None, None, ink[0]) if label == SHADOW else (ink, label + 256 * int(2 * min(z, FAR)), None)
        for pen, fill in zip(self.pens, inks):
            if fill is not None:
                getattr(pen, shape)(scaled, fill=fill, **width)

    def plane(self, label: int, colour: Colour, x: Point, y: Point, z: Point) -> None:
        """Paint a rectangle along the street, on the ground (y0 = y1) or upright (x0 = x1)."""
        corners = ((x[0], y[0], z[0]), (x[1], y[1], z[0]), (x[1], y[1], z[1]), (x[0], y[0], z[1]))
        self.draw("polygon", label, colour, math.sqrt(z[0] * z[1]), *(self.project(*p) for p in corners))

    def facing(self, label: int, x: float, z: float, width: float = 1, height: float = 1,
               base: float = 0) -> Callable[..., None]:
        """Return a brush for an upright plane that faces us: (0, 0) is its foot, (0.5, 1) the top right.

        Its shape "symmetric" is a polygon, of which the right half is given.
        """
        (u, v), across, up = self.project(x, base, z), self.focal * width / z, self.focal * height / z

        def brush(shape: str, colour: Colour, *points: Point, thickness: float = 0) -> None:
            if shape == "symmetric":
                shape, points = "polygon", (*points, *((-s, t) for s, t in reversed(points)))
            pixels = ((u + across * s, v - up * t) for s, t in points)
            self.draw(shape, label, colour, z, *pixels, thickness=across * thickness)

        return brush

    def contact_shadow(self, x: float, z: float, width: float) -> None:
        """Darken the ground under an object."""
        strength = 255 * min(1.0, 0.55 + 0.5 * self.look.ground_shadow)
        self.facing(SHADOW, x, z, width, width)("ellipse", (strength,) * 3, (-0.62, 0.10), (0.62, -0.12))


def plan_street(rng: Generator) -> SimpleNamespace:
    """Return the random layout of a street; dictionaries are keyed by side."""
    kerb = {side: side * rng.uniform(2.4, 5.5) for side in SIDES}
    strips, border = {}, {}  # what lies between kerb and houses: label and width; where the houses begin
    for side in SIDES:
        strips[side] = [(SIDEWALK, rng.uniform(2.2, 5.5))]
        if rng.random() < 0.5:
            strips[side].insert(0 if rng.random() < 0.4 else 1, (TERRAIN, rng.uniform(3, 8)))
        border[side] = kerb[side] + side * sum(width for _, width in strips[side])
    breadth = kerb[1] - kerb[-1]
    dividers = [kerb[-1] + breadth * share for share in ([0.5] if breadth < 7.5 else [0.33, 0.67])]
    lanes = [(a + b) / 2 for a, b in zip([kerb[-1], *dividers], [*dividers, kerb[1]])]  # their centres
    return SimpleNamespace(kerb=kerb, strips=strips, border=border, dividers=dividers, lanes=lanes,
                           end=rng.uniform(45, 130), shaded=rng.choice(SIDES))


def paint_sky(canvas: Canvas) -> None:
    """Paint a sky that grows lighter downwards, with up to four clouds."""
    rng, colour, width, step = canvas.layout, canvas.colour(SKY), canvas.width, 0.05 * canvas.height
    for i in range(12):
        canvas.draw("rectangle", SKY, colour + 14 * i / 11, FAR, (0, i * step), (width, (i + 1) * step + 1))
    for _ in range(rng.integers(5)):
        u, v, r = rng.uniform((0, 0, 0.04), (1, 0.8, 0.19)) * (width, canvas.vanishing[1], width)
        canvas.draw("ellipse", SKY, colour + 28, FAR, (u - r, v - r / 4), (u + r, v + r / 4))


def paint_ground(canvas: Canvas, street: SimpleNamespace) -> None:
    """Paint the road with its markings, what lies to either side of it, and the shadow that houses cast."""
    rng, marking, (left, right) = canvas.layout, canvas.look.marking, (street.kerb[-1], street.kerb[1])
    colours = {label: canvas.colour(label) for label in (ROAD, SIDEWALK, TERRAIN)}
    bands = [(TERRAIN if rng.random() < 0.5 else SIDEWALK, -120, 120)]
    for side in SIDES:
        x = street.kerb[side]
        for label, width in street.strips[side]:
            bands.append((label, x, x + side * width))
            x += side * width
    for label, x0, x1 in [*bands, (ROAD, left, right)]:
        for z in ((1.2, 3), (3, 6), (6, 12), (12, 25), (25, 60), (60, 400)):
            canvas.plane(label, colours[label], (x0, x1), (0, 0), z)
    for x in (left, right):
        canvas.plane(SIDEWALK, 0.8 * colours[SIDEWALK], (x - 0.1, x + 0.1), (0, 0), (1.2, 80))
    for x in street.dividers:
        for z in np.arange(rng.uniform(3, 6), 70, 6.5):
            canvas.plane(ROAD, marking, (x - 0.09, x + 0.09), (0, 0), (z, z + 3))
    if rng.random() < 0.25:  # a zebra crossing
        z = rng.uniform(7, 16)
        for x in np.arange(left + 0.4, right - 0.5, 1.0):
            canvas.plane(ROAD, marking, (x, x + 0.5), (0, 0), (z, z + 3))
    x, z, reach = street.border[street.shaded], 3.0, rng.uniform(1, 7)
    while z < 80:
        length, edge = rng.uniform(5, 16), x - street.shaded * reach * rng.uniform(0.5, 1.3)
        canvas.plane(SHADOW, (255, 255, 255), (x, edge), (0, 0), (z, z + length))
        z += length * rng.uniform(1.0, 1.4)


def paint_far_end(canvas: Canvas, street: SimpleNamespace) -> None:
    """Close the view with a row of houses and woods."""
    rng, x = canvas.layout, -70.0
    while x < 70:
        width, label = rng.uniform(8, 26), VEGETATION if rng.random() < 0.35 else BUILDING
        height = rng.uniform(4, 10) if label == VEGETATION else rng.uniform(6, 22)
        brush = canvas.facing(label, x + width / 2, street.end, width, height)
        x += width
        if rng.random() < 0.8:
            brush("rectangle", canvas.colour(label), (-0.5, 0), (0.5, 0.65 if label == VEGETATION else 1))
            if label == VEGETATION:
                brush("ellipse", canvas.colour(label), (-0.5, 0), (0.5, 1))


def paint_building(canvas: Canvas, x: float, z: float, start: float, side: int, shaded: bool) -> None:
    """Paint a house: its front, its facade along the street, rows of windows and perhaps a cornice."""
    height, glow, colour = canvas.layout.uniform(6, 20), canvas.layout.random(), canvas.colour(BUILDING)
    front = canvas.facing(BUILDING, x + 7 * side, start, 14, height)
    front("rectangle", 0.86 * colour, (-0.5, 0), (0.5, 1))
    facade = (1 - canvas.look.facade_shade * shaded) * colour
    canvas.plane(BUILDING, facade, (x, x), (0, height), (start, z))
    pitch = (z - start) / max(2, int((z - start) / 3))
    columns = np.arange(start + 0.25 * pitch, min(z - 0.5 * pitch, 0.75 * canvas.focal), pitch).tolist()
    for y in np.arange(1.2, height - 1.6, 3.1).tolist():
        pane = (0.8 + 0.4 * glow) * (1 if y > 1.3 else 0.8) * canvas.look.window
        for near in columns:
            canvas.plane(BUILDING, pane, (x, x), (y, y + 1.6), (near, near + 0.5 * pitch))
    if glow < 0.35:
        canvas.plane(BUILDING, 0.7 * colour, (x, x), (0.97 * height, height), (start, z))


def paint_barrier(canvas: Canvas, x: float, z: float, start: float) -> None:
    """Paint a wall with a coping, or a fence with slats and a rail."""
    label, height = WALL if canvas.layout.random() < 0.5 else FENCE, canvas.layout.uniform(1.1, 2.4)
    colour, near = canvas.colour(label), start
    canvas.plane(label, 0.9 * colour, (x, x), (0, height), (start, z))
    while label == FENCE and near < min(z, 0.375 * canvas.focal):
        spread = max(1.0, near / 14)
        canvas.plane(label, 1.45 * colour + 10, (x, x), (0, height), (near, near + 0.28 * spread))
        near += 0.7 * spread
    gain, bottom = (1.3, 0.85) if label == FENCE else (1.2, 0.9)
    canvas.plane(label, gain * colour, (x, x), (bottom * height, height), (start, z))


def paint_plant(canvas: Canvas, x: float, z: float, tree: bool) -> None:
    """Paint a tree or a bush, whose crown is a heap of blobs of different size and brightness."""
    rng, colour, low = canvas.layout, canvas.colour(VEGETATION), 0 if tree else -1
    height = rng.uniform(4, 8.5) if tree else min(7.0, rng.uniform(6, 20))
    middle, radius = (0.72 * height, 0.32 * height) if tree else (0.35 * height, 0.42 * height)
    if tree:
        bark = 0.45 * colour + (28, 16, 8)
        canvas.facing(VEGETATION, x, z)("line", bark, (0, 0), (0, 0.6 * height), thickness=0.28)
    brush = canvas.facing(VEGETATION, x, z, radius, radius, middle)
    blobs = rng.uniform((-1, -0.9, low, low), (1, 0.9, 1, 1), (12 if tree else 14, 4))
    for s, t, size, light in blobs.tolist():
        r, gain = 0.45 + 0.3 * size, 0.75 + 0.5 * light + t / 6
        brush("ellipse", gain * colour, (s - r, t - 0.85 * r), (s + r, t + 0.85 * r))


def paint_pole(canvas: Canvas, x: float, z: float, side: int) -> None:
    """Paint a pole, perhaps with the arm of a lamp, with a traffic light or with a sign."""
    rng, look, brush, colour = canvas.layout, canvas.look, canvas.facing(POLE, x, z), canvas.colour(POLE)
    height, arm, kind, variant = rng.uniform((4.5, 1, 0, 0), (8, 3, 1, 1))
    brush("line", colour, (0, 0), (0, height), thickness=0.2)
    if kind < 0.30:
        brush("line", colour, (0, height), (-side * arm, height), thickness=0.14)
    if 0.25 < kind < 0.62:
        brush = canvas.facing(LIGHT, x - 0.25 * side, z, base=2.65)
        brush("rectangle", canvas.colour(LIGHT, variant), (-0.315, 0), (0.315, 1.5))
        for i, lamp in enumerate(((220, 40, 30), (230, 180, 40), (40, 200, 90))):
            glow, top = 1 if i == int(3 * variant) else 0.35, 1.425 - 0.465 * i
            brush("ellipse", glow * faded(lamp, look.saturation), (-0.165, top - 0.315), (0.165, top))
    elif kind > 0.55:
        colour = canvas.colour(SIGN, variant)
        brush = canvas.facing(SIGN, x - 0.1 * side, z, 0.62, 0.62, 2.6 + variant)
        if variant < 0.4:
            brush("ellipse", colour, (-1, -1), (1, 1))
            brush("ellipse", look.marking, (-0.6, -0.6), (0.6, 0.6))
        elif variant < 0.7:
            brush("rectangle", colour, (-1.3, -0.8), (1.3, 0.8))
            brush("rectangle", look.marking, (-1, -0.1), (1, 0.1))
        else:
            brush("polygon", colour, (0, 1), (1, -0.9), (-1, -0.9))


def paint_car(canvas: Canvas, x: float, z: float, rear: bool, parked: int = 0) -> None:
    """Paint a car from behind or from the front; if parked, on that side of the street, with its flank."""
    look, colour, variant = canvas.look, canvas.colour(CAR), canvas.layout.random()
    canvas.contact_shadow(x, z, 2.2 if parked else 1.9)
    if parked:
        flank, roof = x - 0.9 * parked, 1.45 + 0.2 * variant
        canvas.plane(CAR, 0.8 * colour, (flank, flank), (0.25, 0.85), (z, z + 4.2))
        outline = ((0.85, z + 0.2), (roof, z + 0.9), (roof, z + 2.94), (0.85, z + 3.57))
        pixels = (canvas.project(flank, *point) for point in outline)
        canvas.draw("polygon", CAR, 0.9 * look.glass, z + 1, *pixels)
        for ahead in (0.7, 3.4):
            canvas.facing(CAR, flank, z + ahead)("ellipse", look.tyre, (-0.17, 0), (0.17, 0.68))
    brush = canvas.facing(CAR, x, z, 1.85 + 0.2 * variant, 1.4 + 0.25 * variant)
    for side in SIDES:
        brush("rectangle", look.tyre, (0.28 * side, 0), (0.46 * side, 0.22))
    brush("symmetric", colour, (0.5, 0.14), (0.5, 0.5), (0.44, 0.58))
    brush("symmetric", 0.92 * colour, (0.43, 0.56), (0.3, 1))
    brush("symmetric", look.glass, (0.36, 0.6), (0.26, 0.92))
    for side in SIDES:
        lamp = faded((210, 30, 24) if rear else (240, 240, 220), 0.9 * look.saturation)
        brush("rectangle", lamp, (0.33 * side, 0.36), (0.48 * side, 0.48))
    brush("rectangle", look.marking, (-0.16, 0.22), (0.16, 0.32))


def paint_large_vehicle(canvas: Canvas, x: float, z: float, label: int) -> None:
    """Paint a truck, a bus or a tram from behind, with the flank that the camera sees."""
    look, colour, height = canvas.look, canvas.colour(label), canvas.layout.uniform(2.9, 3.5)
    width, height, length = (2.7, 3.6, 26) if label == TRAIN else (2.5, height, 11 if label == BUS else 7)
    flank = x + width / 2 * (-1 if x > 0.3 else 1)
    canvas.contact_shadow(x, z, width)
    canvas.plane(label, 0.75 * colour, (flank, flank), (0.3, height), (z, z + length))
    for near in np.arange(z + 0.8, z + length - 1, 1.7) if label == BUS else ():
        canvas.plane(label, look.glass, (flank, flank), (0.55 * height, 0.85 * height), (near, near + 1.2))
    if label == TRAIN:
        canvas.plane(label, look.glass, (flank, flank), (1.6, 2.8), (z + 0.5, z + length))
        canvas.plane(label, look.marking, (flank, flank), (1.0, 1.3), (z, z + length))
    brush = canvas.facing(label, x, z, width, height)
    for side in SIDES:
        brush("rectangle", look.tyre, (0.28 * side, 0), (0.45 * side, 0.14))
    brush("rectangle", colour, (-0.5, 0.07), (0.5, 1))
    if label == TRUCK:
        brush("line", 0.6 * colour, (0, 0.95), (0, 0.2), thickness=0.03)
        brush("rectangle", 0.5 * colour, (-0.5, 0.1), (0.5, 0.2))
        brush("rectangle", (180, 40, 36), (-0.47, 0.11), (-0.36, 0.19))
    else:
        brush("rectangle", look.glass, (-0.4, 0.52), (0.4, 0.88))
        brush("rectangle", look.marking, (-0.3, 0.9), (0.3, 0.97))


def paint_person(canvas: Canvas, x: float, z: float, label: int = PERSON) -> None:
    """Paint a pedestrian, or a rider above a saddle."""
    height, pick = canvas.layout.uniform(1.6, 1.9) * (1 if label == PERSON else 0.85), canvas.layout.random()
    if label == PERSON:
        canvas.contact_shadow(x, z, 0.6)
    brush = canvas.facing(label, x, z, height, height, 0 if label == PERSON else 0.55)
    skin = faded((205, 160, 130), 0.9 * canvas.look.saturation)
    trousers = 0.55 * canvas.colour(label, 1 - pick)
    brush("symmetric", trousers, (0, 0.35), (0.04, 0), (0.135, 0), (0.11, 0.5))
    brush("symmetric", canvas.colour(label, pick), (0.17, 0.45), (0.15, 0.82))
    brush("ellipse", skin, (-0.085, 0.81), (0.085, 1))


def paint_two_wheeler(canvas: Canvas, x: float, z: float, ridden: bool) -> None:
    """Paint a bicycle or a motorcycle, half turned, with or without a rider."""
    label = BICYCLE if canvas.layout.random() < 0.6 else MOTORCYCLE
    r, half = 0.36 if label == BICYCLE else 0.34, canvas.layout.uniform(0.26, 0.52)  # of wheel, of wheelbase
    colour, brush = canvas.colour(label), canvas.facing(label, x, z)
    tyre = 0.6 * colour if label == BICYCLE else canvas.look.tyre
    canvas.contact_shadow(x, z, 1.4)
    for hub in (-half, half):
        brush("ellipse", tyre, (hub - r, 0), (hub + r, 2 * r))
        if label == BICYCLE and canvas.focal * r / z > 2.5:
            brush("ellipse", 0.5 * colour + 70, (hub - 0.6 * r, 0.4 * r), (hub + 0.6 * r, 1.6 * r))
    bicycle = ((-half, r), (-0.4 * half, 2.5 * r), (0.7 * half, 2.6 * r), (half, r), (0, 0.8 * r))
    motorcycle = ((-half - 0.4 * r, r), (-half, 2.5 * r), (half, 2.9 * r), (half + 0.4 * r, r))
    brush("polygon", colour, *(bicycle if label == BICYCLE else motorcycle))
    brush("line", colour, (0.7 * half, 2.6 * r), (0.7 * half, 3.5 * r), thickness=0.3 * r)
    if ridden:
        paint_person(canvas, x, z, RIDER)


def plan_roadside(rng: Generator, street: SimpleNamespace, side: int) -> Plan:
    """Place houses, bushes, walls and fences along one side, and trees and poles along its kerb."""
    plan: Plan = []
    x, start, density = street.border[side], rng.uniform(1.5, 4), rng.uniform(0.7, 1.05)
    while start < street.end - 4:
        end, kind = min(start + rng.uniform(7, 22), street.end), rng.random() - 0.8 * density
        if kind < 0:
            plan.append((end, paint_building, x + 0.3 * side, start, side, side == street.shaded))
        elif kind < 0.18:
            plan += [(z, paint_plant, x + 2.8 * side, False) for z in np.linspace(start, end, 11)[1::2]]
        if rng.random() < 0.42:
            plan.append((end - 0.01, paint_barrier, x - 0.2 * side, max(start, 2.0)))
        start = end + (rng.uniform(0, 6) if rng.random() < 0.35 else 0)
    z, spacing = rng.uniform(7, 18) if rng.random() < 0.6 else 60.0, rng.uniform(9, 20)
    while z < 60:
        plan.append((z, paint_plant, street.kerb[side] + 1.1 * side, True))
        z += spacing * rng.uniform(0.7, 1.5)
    z = rng.uniform(4, 10)
    while z < 60:
        plan.append((z, paint_pole, street.kerb[side] + 0.6 * side, side))
        z += rng.uniform(6, 20)
    return plan


def plan_traffic(rng: Generator, street: SimpleNamespace) -> Plan:
    """Place pedestrians, and vehicles so that they do not overlap."""
    plan: Plan = []
    taken: list[tuple[float, float, float]] = []  # x, z and length of a vehicle
    left, right = street.kerb[-1], street.kerb[1]

    def add(length: float, z: float, painter: Callable, x: float, *details: int) -> None:
        if not any(abs(x - a) < 2.2 and abs(z - b) < max(length, c) + 1 for a, b, c in taken):
            taken.append((x, z, length))
            plan.append((z, painter, x, *details))

    for _ in range(rng.integers(2) + int(rng.random() < 0.35)):
        label, side = (TRUCK, BUS, TRAIN)[rng.integers(3)], rng.choice(SIDES)
        x, farthest = (street.kerb[side] - side, 22) if label == TRAIN else (rng.choice(street.lanes), 34)
        add(12, rng.uniform(9, farthest), paint_large_vehicle, x, label)
    for _ in range(rng.integers(1, 6)):
        x = rng.choice(street.lanes) + rng.uniform(-0.3, 0.3)
        add(5, rng.uniform(6.5, 45), paint_car, x, x > 0)
    for side in SIDES:
        z = rng.uniform(5, 12) if rng.random() < 0.6 else 50.0
        while z < 50:
            if rng.random() < 0.75:
                add(5, z, paint_car, street.kerb[side] - 1.1 * side, True, side)
            z += rng.uniform(5.2, 8)
    for _ in range(rng.integers(4)):
        ridden, side = rng.random() < 0.65, rng.choice(SIDES)
        x = rng.uniform(left + 0.5, right - 0.5) if ridden else street.kerb[side] + 0.8 * side
        add(1.5, rng.uniform(5, 18), paint_two_wheeler, x, ridden)
    for _ in range(rng.integers(1, 7)):
        side = rng.choice(SIDES)
        x = street.border[side] - side * rng.uniform(0.3, dict(street.strips[side])[SIDEWALK])
        x = x if rng.random() < 0.85 else rng.uniform(left, right)
        plan.append((rng.uniform(5, 28), paint_person, x))
    return plan


def develop(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Return image and labels of a finished canvas, with texture, shadow, haze, tone, lens and noise."""
    look, rng, (width, height) = canvas.look, canvas.appearance, (canvas.width, canvas.height)
    filters = (Image.Resampling.BOX, Image.Resampling.NEAREST, Image.Resampling.BOX)
    shrunk = (image.resize((width, height), f) for image, f in zip(canvas.images, filters, strict=True))
    rgb, code, shade = (np.asarray(image) for image in shrunk)
    labels, depth = (code & 255).astype(np.uint8), (code >> 8).astype(np.float32) / 2

    gain = np.ones((height, width), np.float32)
    for amplitude, cell in zip(np.moveaxis(TEXTURE[labels], -1, 0), (1, 3, 16), strict=True):
        cells = math.ceil(height / cell), math.ceil(width / cell)
        field = Image.fromarray(rng.standard_normal(cells, np.float32))
        gain += look.texture * amplitude * np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
    gain *= 1 - look.ground_shadow / 255 * shade * np.isin(labels, (ROAD, SIDEWALK, TERRAIN))
    rgb = rgb * np.clip(gain, 0.2, 2)[..., None]

    haze = look.haze * rng.uniform(0.7, 1.3) * (1 - np.exp(-depth / 70)) * (labels != SKY)
    rgb += (HAZE_COLOUR - rgb) * haze[..., None]
    grey = rgb.mean(-1, keepdims=True)
    rgb = grey + (rgb - grey) * (look.saturation * rng.uniform(0.9, 1.1))
    rgb = (rgb - 128) * (look.contrast * rng.uniform(0.94, 1.06)) + 128 + look.brightness + rng.uniform(-8, 8)
    rgb = 255 * (np.clip(rgb * np.float32(look.cast), 0, 255) / 255) ** look.gamma
    across, down = (np.linspace(-1, 1, n, dtype=np.float32) for n in (width, height))
    rgb *= (1 - look.vignette / 2 * (across**2 + down[:, None] ** 2))[..., None]
    lens = ImageFilter.GaussianBlur(look.blur)
    rgb = np.asarray(Image.fromarray(rgb.astype(np.uint8)).filter(lens), np.float32)
    rgb = rgb + look.noise * rng.standard_normal(rgb.shape, np.float32)
    return np.clip(rgb, 0, 255).astype(np.uint8), labels


def draw_scene(seed: int, domain: str, width: int = 192, height: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) and its raw label ids (H, W), which are the same in both domains."""
    canvas = Canvas(seed, domain, width, height)
    rng, street = canvas.layout, plan_street(canvas.layout)
    paint_sky(canvas)
    paint_ground(canvas, street)
    paint_far_end(canvas, street)
    plan = plan_roadside(rng, street, -1) + plan_roadside(rng, street, 1) + plan_traffic(rng, street)
    for z, painter, x, *details in sorted(plan, key=lambda item: -item[0]):
        painter(canvas, x, z, *details)
    return develop(canvas)


def write_demo_data(root: str | Path, seed: int = 1234, source: int = 400, target: int = 400,
                    val: int = 100) -> Path:
    """Write a miniature GTA5 and Cityscapes to <root>/seed<seed>, unless it exists; return that folder."""
    folder = Path(root) / f"seed{seed}"
    if folder.is_dir():
        return folder
    splits = enumerate((("source", source), ("train", target), ("val", val)))
    jobs = [(split, i * SPLIT_STRIDE, n) for i, (split, count) in splits for n in range(count)]
    palette = colourise(LABEL_TO_TRAIN).ravel().tolist()  # by raw id
    with atomic_folder(folder) as draft:
        for split, first, n in tqdm(jobs, desc=f"generating {folder}", unit="scene", disable=None):
            interrupt.exit_if_pending()
            domain, stem = "source" if split == "source" else "target", f"{split}/demo/demo_{n:06d}_000000"
            rgb, labels = map(Image.fromarray, draw_scene(seed * SEED_STRIDE + first + n, domain))
            names = f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"
            if split == "source":
                labels.putpalette(palette)  # the mode becomes "P", the ids become indices
                names = f"images/{n + 1:05d}.png", f"labels/{n + 1:05d}.png"
            for image, name in zip((rgb, labels), names):
                path = draft / ("GTA5" if split == "source" else "Cityscapes") / name
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, compress_level=1)
    return folder
