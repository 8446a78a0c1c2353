"""Drawn categories: eight materials in four layouts, with eight kinds of defects.

They are there to choose features on, before any real test set is looked at. A category is a
material in a layout; each of its images is a function of the category's seed and a number, and
differs from the others as photographs of one product do: another piece of material, another
place or turn of the part, light, sharpness and noise. Lengths are in pixels, colours in 0..1.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

SIDE = 256  # of an image
_SHEET = 384  # side of a sheet of material, from which images cut pieces
_RADIUS = 0.38 * SIDE  # of a part

LAYOUTS = ("surface", "fixed", "turned", "many")
DEFECTS = ("scratch", "stain", "hole", "crack", "foreign", "warp", "missing", "worn")

Random = np.random.Generator
Field = np.ndarray  # (h, w) float


# ---------------------------------------------------------------- materials


def _noise(
    rng: Random, exponent: float, angle: float | None = None, stretch: float = 1.0
) -> Field:
    """Return noise of deviation 1 whose amplitude falls as frequency^-exponent.

    With an angle, it is drawn out by `stretch` along one direction, as by brushing.
    """
    fy = np.fft.fftfreq(_SHEET)[:, None]
    fx = np.fft.rfftfreq(_SHEET)[None]
    if angle is not None:
        along = fx * np.cos(angle) + fy * np.sin(angle)
        fy, fx = fy * np.cos(angle) - fx * np.sin(angle), along * stretch
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((_SHEET, _SHEET))) * frequency**-exponent
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (_SHEET, _SHEET))
    return noise / noise.std()


def _grid(side: int = _SHEET) -> tuple[Field, Field]:
    y, x = np.mgrid[:side, :side].astype(float)
    return y, x


def _grain(rng: Random) -> Field:
    return 0.5 + 0.12 * _noise(rng, rng.uniform(0.6, 1.4))


def _brushed(rng: Random) -> Field:
    return 0.5 + 0.1 * _noise(rng, 0.7, rng.uniform(0, np.pi), rng.uniform(8, 20))


def _weave(rng: Random) -> Field:
    period, (y, x) = rng.uniform(7, 13), _grid()
    y, x = (np.pi * (z + _noise(rng, 1.5)) / period for z in (y, x))
    threads = np.where(np.sin(x) * np.sin(y) > 0, np.sin(2 * x), np.sin(2 * y))
    return 0.5 + 0.18 * threads + 0.04 * _noise(rng, 0.5)


def _cells(rng: Random) -> Field:
    count = int(rng.uniform(500, 1400))
    centres = rng.uniform(-10, _SHEET + 10, (count, 2))
    points = np.stack([z.ravel() for z in _grid()], axis=1)
    distances, nearest = map(np.asarray, KDTree(centres).query(points, k=2))
    edges = np.clip((distances[:, 1] - distances[:, 0]) / 4, 0, 1)
    tones = rng.uniform(-0.06, 0.06, count)[nearest[:, 0]]
    return (0.3 + 0.3 * edges + tones).reshape(_SHEET, _SHEET) + 0.03 * _noise(rng, 0.8)


def _speckle(rng: Random) -> Field:
    spots = ndimage.gaussian_filter(rng.standard_normal((_SHEET, _SHEET)), 1.2)
    spots /= spots.std()
    return 0.5 + 0.06 * _noise(rng, 0.9) + 0.22 * (spots > 1.3) - 0.2 * (spots < -1.5)


def _rings(rng: Random) -> Field:
    y, x = _grid()
    radius = np.hypot(y + rng.uniform(100, 400), 0.35 * (x - 200)) + 6 * _noise(rng, 1.6)
    rings = 0.12 * np.sin(2 * np.pi * radius / rng.uniform(9, 22))
    return 0.5 + rings + 0.05 * _noise(rng, 0.8, 0.0, 10)


def _tiles(rng: Random) -> Field:
    period, (y, x) = rng.uniform(18, 34), _grid()
    x = x + (y // period) % 2 * period / 2
    inside = period / 2 - np.maximum(*(np.abs(z % period - period / 2) for z in (y, x)))
    return 0.55 - 0.25 * np.clip(2.2 - inside, 0, 1) + 0.05 * _noise(rng, 1.0)


def _smooth(rng: Random) -> Field:
    return 0.5 + 0.02 * _noise(rng, 1.8) + 0.008 * _noise(rng, 0.0)


MATERIALS: dict[str, Callable[[Random], Field]] = {
    "grain": _grain,
    "brushed": _brushed,
    "weave": _weave,
    "cells": _cells,
    "speckle": _speckle,
    "rings": _rings,
    "tiles": _tiles,
    "smooth": _smooth,
}


# ---------------------------------------------------------------- defects


def _place(rng: Random, where: np.ndarray) -> tuple[int, int]:
    rows, columns = np.nonzero(where)
    chosen = rng.integers(len(rows))
    return int(rows[chosen]), int(columns[chosen])


def _blob(rng: Random, size: float, where: np.ndarray) -> Field:
    """Return an irregular patch of about `size` pixels across, of soft edge."""
    (y, x), (row, column) = _grid(SIDE), _place(rng, where)
    angle = np.arctan2(y - row, x - column)
    waves = (
        rng.normal(0, 0.25 / m) * np.cos(m * angle + rng.uniform(0, 7)) for m in range(1, 5)
    )
    edge = size / 2 * (1 + sum(waves))
    distance = np.hypot(y - row, (x - column) * rng.uniform(0.7, 1.4))
    return np.clip((edge - distance) / 1.5 + 0.5, 0, 1)


def _line(rng: Random, length: float, width: float, bend: float, where: np.ndarray) -> Field:
    """Return a line whose direction changes by `bend` radians a pixel."""
    row, column = _place(rng, where)
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, int(length)))
    path = np.stack([row + np.cumsum(np.sin(angle)), column + np.cumsum(np.cos(angle))], axis=1)
    points = np.stack([z.ravel() for z in _grid(SIDE)], axis=1)
    distance = KDTree(path).query(points)[0].reshape(SIDE, SIDE)
    return np.clip(width / 2 - distance + 0.5, 0, 1)


# ---------------------------------------------------------------- categories


@dataclasses.dataclass(frozen=True)
class Category:
    """A product to inspect.

    Attributes:
      seed: decides all that is not named here.
      material: key of `MATERIALS`, of the part.
      layout: one of `LAYOUTS`: a surface that fills the image, a part that lies still, one that
        lies at any angle, or nine parts in rows.
    """

    seed: int
    material: str
    layout: str

    @functools.cached_property
    def _look(self) -> dict:
        """Colours, sheets of material, and the part's outline."""
        rng = np.random.default_rng((self.seed, 0))
        # A third of all categories is grey, as many real ones are.
        vivid = 0.0 if self.seed % 3 == 0 else rng.uniform(0.1, 0.5)
        others = [name for name in MATERIALS if name != self.material]
        foreign = MATERIALS[others[rng.integers(len(others))]]
        ground = MATERIALS["grain" if rng.random() < 0.5 else "smooth"]
        seeds = [np.random.default_rng((self.seed, 1, i)) for i in range(6)]
        return {
            "hue": 1 + vivid * rng.uniform(-1, 1, 3),
            "tint": vivid * rng.uniform(-0.1, 0.1, 3),
            "back": rng.uniform(0.05, 0.9) * (1 + 0.7 * vivid * rng.uniform(-1, 1, 3)),
            "sheets": [MATERIALS[self.material](seed) for seed in seeds[:4]],
            "foreign": foreign(seeds[4]),
            "ground": 0.5 * (ground(seeds[5]) - 0.5),
            "outline": [(rng.normal(0, 0.12 / m), rng.uniform(0, 7)) for m in range(1, 7)],
            "slender": rng.uniform(0.25, 0.4),
            "marks": rng.uniform((-0.5, -0.5, 0.08, -0.3), (0.5, 0.5, 0.2, 0.3), (4, 4)),
            "noise": rng.uniform(0.006, 0.02),
        }

    def draw(self, number: int, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw an image.

        Args:
          number: which one.
          defect: one of `DEFECTS`, or None.

        Returns:
          (h, w, 3) uint8, and the defect's pixels (h, w) bool.
        """
        rng, look = np.random.default_rng((self.seed, 2, number)), self._look
        sheet, corner = look["sheets"][rng.integers(4)], rng.integers(0, _SHEET - SIDE, 2)
        cut = tuple(slice(start, start + SIDE) for start in corner)
        body, alpha, tone = sheet[cut], np.ones((SIDE, SIDE)), np.zeros((SIDE, SIDE))
        if self.layout != "surface":
            body, alpha, tone = self._part(rng, sheet, body)
        colour = (body + tone)[..., None] * look["hue"] + look["tint"]
        ground = np.clip(look["back"] + look["ground"][cut][..., None], 0, 1)
        foreign = look["foreign"][cut][..., None] * look["hue"] + look["tint"]
        image, mask = _spoilt(rng, defect, colour, ground, foreign, alpha)
        y, x = _grid(SIDE)
        slopes = rng.normal(0, 0.03, 2)
        light = rng.normal(1, 0.03) * (
            1 + slopes[0] * (y / SIDE - 0.5) + slopes[1] * (x / SIDE - 0.5)
        )
        blur = abs(rng.normal(0.5, 0.1))
        image = ndimage.gaussian_filter(image * light[..., None], (blur, blur, 0))
        image = image + rng.normal(0, look["noise"], image.shape)
        return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8), mask > 0.5

    def _part(self, rng: Random, sheet: Field, body: Field) -> tuple[Field, Field, Field]:
        """Return the material, opacity and marks of the part or parts."""
        look, (y, x) = self._look, _grid(SIDE)
        turned = self.layout == "turned"
        turn = rng.uniform(0, 2 * np.pi) if turned else rng.normal(0, 0.015)
        row, column = SIDE / 2 + rng.normal(0, 1.5, 2)
        if self.layout == "many":
            period = SIDE / 3
            v, u = (
                ((z + SIDE / 2) % period - period / 2) / (0.36 * period)
                for z in (y - row, x - column)
            )
        else:
            v, u = (y - row) / _RADIUS, (x - column) / _RADIUS
        v, u = v * np.cos(turn) - u * np.sin(turn), v * np.sin(turn) + u * np.cos(turn)
        if self.layout != "many":  # the material lies as the part does
            at = [_SHEET / 2 + _RADIUS * z for z in (v, u)]
            body = ndimage.map_coordinates(sheet, at, order=1, mode="mirror")
        if turned:
            v = v / look["slender"]
        angle, radius = np.arctan2(v, u), np.hypot(v, u)
        waves = (a * np.cos(m * angle + b) for m, (a, b) in enumerate(look["outline"], 1))
        sharp = 18 if self.layout == "many" else 45
        alpha = np.clip(sharp * (1 + sum(waves) - radius) + 0.5, 0, 1)
        tone = np.zeros_like(v)
        for row, column, size, change in look["marks"]:
            tone += change * np.clip(30 * (size - np.hypot(v - row, u - column)) + 0.5, 0, 1)
        return body, alpha, tone


def _spoilt(
    rng: Random,
    defect: str | None,
    colour: np.ndarray,
    ground: np.ndarray,
    foreign: np.ndarray,
    alpha: Field,
) -> tuple[np.ndarray, Field]:
    """Return the image of a part on its ground, with a defect, and that one's pixels."""
    mask, size = np.zeros_like(alpha), rng.uniform(9, 34)
    inside = ndimage.binary_erosion(alpha > 0.9, iterations=3)
    if defect == "scratch":
        mask = _line(rng, rng.uniform(25, 90), rng.uniform(1.5, 3), 0.03, inside)
        change = rng.choice([-1, 1]) * rng.uniform(0.12, 0.35)
    elif defect == "crack":
        mask = _line(rng, rng.uniform(30, 80), rng.uniform(1.5, 3), 0.35, inside)
        change = -0.6 * colour
    elif defect == "stain":
        mask, change = _blob(rng, size, inside), rng.uniform(-0.25, 0.25, 3)
    elif defect == "hole":
        mask, change = _blob(rng, 0.7 * size, inside), -0.8 * colour
    elif defect == "foreign":
        mask, change = _blob(rng, size, inside), foreign - colour
    elif defect == "worn":
        mask = _blob(rng, 1.3 * size, inside)
        change = ndimage.gaussian_filter(colour, (5, 5, 0)) + 0.05 - colour
    else:
        change = 0.0
    image = ground + alpha[..., None] * (colour + mask[..., None] * change - ground)
    if defect == "missing":
        rim = alpha > 0.5
        if not rim.all():
            rim &= np.logical_not(ndimage.binary_erosion(rim, iterations=8))
        mask = _blob(rng, size, rim) * alpha
        image = image + mask[..., None] * (ground - image)
    elif defect == "warp":
        mask = _blob(rng, 1.5 * size, inside)
        shift = rng.choice([-1, 1], 2) * rng.uniform(4, 9, 2)
        soft, (y, x) = ndimage.gaussian_filter(mask, 4), _grid(SIDE)
        at = [y + shift[0] * soft, x + shift[1] * soft]
        channels = (
            ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest")
            for c in range(3)
        )
        image = np.stack(list(channels), axis=-1)
    else:
        mask = mask * alpha
    return image, mask


def categories() -> dict[str, Category]:
    """Return a category of each material, two of each layout, by "material-layout"."""
    layouts = [LAYOUTS[(3 * i + i // 4) % 4] for i in range(len(MATERIALS))]
    return {
        f"{material}-{layout}": Category(100 + i, material, layout)
        for i, (material, layout) in enumerate(zip(MATERIALS, layouts, strict=True))
    }


def draw(
    category: Category, train: int = 48, good: int = 8, each: int = 2
) -> dict[str, np.ndarray]:
    """Draw a category's images.

    Args:
      category: the category.
      train: number of normal images to fit.
      good: number of normal test images.
      each: number of test images of each kind of defect.

    Returns:
      `train` (n, h, w, 3) and `test` uint8, `masks` (m, h, w) bool, `kinds` (m,), "good" or the
      defect.
    """
    test = [(*category.draw(1000 + i), "good") for i in range(good)]
    for kind, defect in enumerate(DEFECTS):
        for i in range(each):
            number = 2000 + 100 * kind + i
            image, mask = category.draw(number, defect)
            while mask.sum() < 12:  # too small to be seen
                number += each
                image, mask = category.draw(number, defect)
            test.append((image, mask, defect))
    images, masks, kinds = zip(*test, strict=True)
    return {
        "train": np.stack([category.draw(i)[0] for i in range(train)]),
        "test": np.stack(images),
        "masks": np.stack(masks),
        "kinds": np.array(kinds),
    }
