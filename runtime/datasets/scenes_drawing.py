"""From a description and its layout to the bytes of a PNG file, the same on every machine."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .scenes_description import Description, Dice
from .scenes_layout import SIZE, Layout, Placed
from .scenes_raster import RGB, Part, covered, ellipse, polygon, rectangle
from .scenes_sprites import rasterise

Pixels = NDArray[np.uint8]  # (SIZE, SIZE, 3), RGB


def draw(description: Description, layout: Layout, dice: Dice) -> Pixels:
    """The scene's pixels. `dice` throws what no caption speaks of: the background's details, tints and little distractors."""
    background = Background(dice)
    _SETTINGS[description.setting](background)
    pixels = background.pixels
    if layout.third is not None:
        _blit(pixels, layout.third)
    first, second = layout.first, layout.second
    if description.relation == "inside":
        _blit(pixels, second, layers=(False,))
        _blit(pixels, first)
        _blit(pixels, second, layers=(True,))
    elif description.relation in ("behind", "right of", "below"):
        _blit(pixels, first)
        _blit(pixels, second)
    else:  # also when holding: the hand lies over what it holds
        _blit(pixels, second)
        _blit(pixels, first)
    return pixels


def png_bytes(pixels: Pixels) -> bytes:
    """A PNG file of the pixels, uncompressed: compressors differ between builds of zlib, stored blocks do not."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1).tobytes()
    assert len(rows) < 2**16, "one stored block holds at most 65535 bytes"
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    stream = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _blit(pixels: Pixels, placed: Placed, layers: tuple[bool, ...] = (False, True)) -> None:
    for front in layers:
        rgb, opaque = rasterise(placed.sprite, placed.thing.colour, placed.size, flip=placed.flip, front=front)
        top, left = placed.top - 1, placed.left - 1  # the outline lies outside the box
        height, width = opaque.shape
        assert min(top, left) >= 0, placed
        pixels[top : top + height, left : left + width][opaque] = rgb[opaque]


class Background:
    """A canvas for one setting: bands and shapes over the whole picture, all shifted by one thrown tint."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
        self.horizon = dice.between(42, 50)
        self._tint = [dice.between(-9, 9) for _ in range(3)]

    def shade(self, colour: RGB) -> RGB:
        """The colour under this scene's tint."""
        red, green, blue = (
            min(max(channel + shift, 0), 255) for channel, shift in zip(colour, self._tint, strict=True)
        )
        return red, green, blue

    def bands(self, top: int, bottom: int, start: RGB, end: RGB, steps: int = 5) -> None:
        """Horizontal bands from one colour to another."""
        for step in range(steps):
            red, green, blue = (a + (b - a) * step // (steps - 1) for a, b in zip(start, end, strict=True))
            rows = slice(top + (bottom - top) * step // steps, top + (bottom - top) * (step + 1) // steps)
            self.pixels[rows] = self.shade((red, green, blue))

    def fill(self, part: Part, colour: RGB) -> None:
        """One shape, in pixels."""
        xs, ys = zip(*part.points, strict=True)
        left, top = max(min(xs), 0), max(min(ys), 0)
        window = self.pixels[top : max(ys), left : max(xs)]
        height, width, _ = window.shape
        moved = replace(part, points=tuple((x - left, y - top) for x, y in part.points))
        window[covered(moved, (width, height), (width, height))] = self.shade(colour)

    def specks(
        self, count: int, top: int, bottom: int, colours: tuple[RGB, ...], *, width: int = 2, height: int = 1
    ) -> None:
        """Little blocks anywhere between two heights."""
        for _ in range(count):
            x, y = self.dice.between(1, SIZE - width - 1), self.dice.between(top, bottom - height)
            self.pixels[y : y + height, x : x + width] = self.shade(self.dice.pick(colours))

    def clouds(self, colour: RGB) -> None:
        """Up to two clouds."""
        for _ in range(self.dice.between(0, 2)):
            x, y = self.dice.between(2, 70), self.dice.between(6, 22)
            self.fill(ellipse("", x, y, x + 18, y + 6), colour)
            self.fill(ellipse("", x + 4, y - 3, x + 13, y + 5), colour)

    def birds(self) -> None:
        """Up to three distant birds."""
        for _ in range(self.dice.between(0, 3)):
            x, y = self.dice.between(4, SIZE - 9), self.dice.between(4, 34)
            for dx, dy in ((0, 0), (1, 1), (2, 0), (3, 1), (4, 0)):
                self.pixels[y + dy, x + dx] = self.shade((70, 70, 84))

    def stones(self, top: int, colour: RGB) -> None:
        """Up to three stones on the ground."""
        for _ in range(self.dice.between(0, 3)):
            x, y = self.dice.between(2, SIZE - 8), self.dice.between(top, SIZE - 5)
            self.fill(ellipse("", x, y, x + self.dice.between(4, 6), y + 4), colour)


def _beach(scene: Background) -> None:
    shore = scene.horizon + scene.dice.between(10, 14)
    scene.bands(0, scene.horizon, (150, 214, 244), (214, 240, 250))
    scene.bands(scene.horizon, shore, (20, 116, 178), (64, 178, 206), 4)
    scene.bands(shore, SIZE, (240, 220, 164), (224, 196, 132), 4)
    scene.specks(10, scene.horizon + 1, shore - 1, ((196, 232, 240),), width=6)
    scene.pixels[shore : shore + 2] = scene.shade((246, 250, 250))
    scene.clouds((250, 252, 252))
    scene.birds()
    scene.specks(scene.dice.between(3, 7), shore + 4, SIZE - 2, ((196, 160, 110), (250, 236, 214), (206, 148, 140)))
    scene.stones(shore + 4, (186, 166, 140))


def _field(scene: Background) -> None:
    scene.bands(0, scene.horizon, (112, 182, 240), (190, 224, 248))
    hill = scene.dice.between(-20, 60)
    scene.fill(ellipse("", hill, scene.horizon - 9, hill + 70, scene.horizon + 20), (104, 170, 92))
    scene.bands(scene.horizon, SIZE, (132, 196, 92), (92, 160, 62), 4)
    scene.clouds((250, 252, 252))
    scene.birds()
    scene.specks(26, scene.horizon + 2, SIZE - 3, ((72, 136, 50), (158, 214, 110)), width=1, height=3)
    scene.specks(scene.dice.between(4, 9), scene.horizon + 4, SIZE - 3, ((246, 236, 140), (244, 200, 220)), height=2)
    scene.stones(scene.horizon + 6, (150, 152, 146))


def _snow(scene: Background) -> None:
    scene.bands(0, scene.horizon, (148, 160, 184), (196, 206, 222))
    hill = scene.dice.between(-20, 60)
    scene.fill(ellipse("", hill, scene.horizon - 8, hill + 70, scene.horizon + 20), (214, 222, 234))
    for _ in range(scene.dice.between(3, 6)):
        x, top = scene.dice.between(2, SIZE - 10), scene.horizon - scene.dice.between(10, 15)
        scene.fill(polygon("", (x, scene.horizon), (x + 4, top), (x + 8, scene.horizon)), (110, 132, 138))
    scene.bands(scene.horizon, SIZE, (228, 234, 244), (208, 218, 234), 3)
    scene.specks(70, 0, SIZE, ((244, 246, 250), (250, 250, 252)), width=2, height=2)
    scene.stones(scene.horizon + 6, (150, 158, 172))


def _city(scene: Background) -> None:
    scene.bands(0, scene.horizon, (176, 190, 204), (206, 212, 218))
    street = scene.horizon + 8
    x = -scene.dice.between(0, 8)
    while x < SIZE:
        width, top = scene.dice.between(12, 20), scene.dice.between(8, 30)
        wall = scene.dice.pick(((122, 118, 124), (146, 126, 116), (104, 112, 130)))
        left, right = max(x, 0), min(x + width - 1, SIZE)
        scene.pixels[top:street, left:right] = scene.shade(wall)
        for row in range(top + 3, street - 4, 6):
            for column in range(x + 2, x + width - 4, 5):
                if 0 <= column < SIZE - 2:
                    lit = scene.dice.pick(((206, 214, 220), (206, 214, 220), (240, 226, 168)))
                    scene.pixels[row : row + 3, column : column + 2] = scene.shade(lit)
        x += width
    scene.bands(street, street + 5, (172, 170, 168), (160, 158, 158), 2)
    scene.bands(street + 5, SIZE, (96, 98, 104), (82, 84, 90), 3)
    for dash in range(scene.dice.between(0, 8), SIZE, 18):
        scene.pixels[76:78, dash : dash + 9] = scene.shade((214, 214, 206))
    scene.specks(scene.dice.between(2, 6), street + 8, SIZE - 2, ((64, 66, 72), (120, 122, 126)))


def _desert(scene: Background) -> None:
    scene.bands(0, scene.horizon, (240, 206, 150), (250, 230, 186))
    for _ in range(3):
        dune = scene.dice.between(-30, 70)
        height = scene.dice.between(6, 14)
        scene.fill(ellipse("", dune, scene.horizon - height, dune + 60, scene.horizon + 20), (216, 152, 88))
    scene.bands(scene.horizon, SIZE, (226, 164, 96), (206, 140, 76), 4)
    for side in (scene.dice.between(2, 14), scene.dice.between(76, 86)):
        foot = scene.horizon + scene.dice.between(2, 6)
        for box in ((3, -20, 7, 0), (0, -15, 2, -8), (0, -9, 4, -7), (8, -13, 10, -5), (6, -7, 10, -5)):
            left, top, right, bottom = box
            scene.fill(rectangle("", side + left, foot + top, side + right, foot + bottom), (92, 128, 72))
    scene.specks(
        scene.dice.between(5, 9), scene.horizon + 6, SIZE - 3, ((170, 110, 62), (150, 96, 60)), width=3, height=2
    )
    scene.stones(scene.horizon + 6, (176, 128, 92))


def _night(scene: Background) -> None:
    scene.bands(0, scene.horizon, (14, 18, 58), (36, 46, 100))
    scene.specks(26, 0, scene.horizon - 4, ((226, 228, 246), (150, 158, 206)), width=1)
    x, y = scene.dice.between(6, 74), scene.dice.between(5, 12)
    scene.fill(ellipse("", x, y, x + 14, y + 14), (236, 232, 206))
    scene.fill(ellipse("", x + 5, y - 2, x + 18, y + 11), (20, 25, 67))
    scene.bands(scene.horizon, SIZE, (34, 54, 66), (22, 36, 48), 4)
    scene.specks(14, scene.horizon + 2, SIZE - 3, ((48, 74, 80),), width=1, height=3)
    scene.stones(scene.horizon + 6, (70, 84, 100))


def _sunset(scene: Background) -> None:
    scene.bands(0, scene.horizon, (118, 64, 132), (252, 160, 74), 7)
    x = scene.dice.between(14, 54)
    scene.fill(ellipse("", x, scene.horizon - 15, x + 30, scene.horizon + 15), (255, 226, 128))
    scene.bands(scene.horizon, SIZE, (128, 70, 84), (78, 42, 66), 5)
    scene.birds()
    scene.specks(12, scene.horizon + 2, SIZE - 3, ((160, 92, 88), (60, 32, 54)), width=4)
    scene.stones(scene.horizon + 6, (104, 62, 84))


def _room(scene: Background) -> None:
    floor = scene.horizon + scene.dice.between(8, 12)
    scene.bands(0, floor, (226, 208, 190), (226, 208, 190), 2)
    stripe = scene.dice.between(8, 12)
    for x in range(scene.dice.between(0, stripe), SIZE, stripe):
        scene.pixels[:floor, x : x + 2] = scene.shade((214, 192, 172))
    scene.pixels[floor - 3 : floor] = scene.shade((244, 238, 228))
    left, top = scene.dice.between(6, 62), scene.dice.between(5, 10)
    scene.fill(rectangle("", left, top, left + 28, top + 24), (150, 112, 78))
    for column in (2, 15):
        for row in (2, 13):
            box = rectangle("", left + column, top + row, left + column + 11, top + row + 9)
            scene.fill(box, (176, 216, 240))
    scene.bands(floor, SIZE, (172, 124, 82), (154, 108, 70), 3)
    for y in range(floor + 6, SIZE, 9):
        scene.pixels[y] = scene.shade((128, 88, 56))
        seam = scene.dice.between(0, SIZE - 1)
        scene.pixels[y : y + 9, seam] = scene.shade((128, 88, 56))


_SETTINGS: dict[str, Callable[[Background], None]] = {
    "beach": _beach,
    "field": _field,
    "snow": _snow,
    "city": _city,
    "desert": _desert,
    "night": _night,
    "sunset": _sunset,
    "room": _room,
}
