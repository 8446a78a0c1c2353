"""Procedural images: objects of textured, coloured materials, lit, and sometimes defective.

A scene is a ground with some objects on it that may hide each other, like a part under a
camera. It is seen many times: `key` determines the scene, `view` the differences between two
photographs of it, including defects. A scene thus corresponds to a category for PaDiM: normal
images of one thing, and some with defects known pixel by pixel. Everything is a
pure function of random keys, for one image; `jax.vmap` draws many.

Lengths are in pixels, angles in radians, colours in 0..1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt8

from padim_jax.pretrain import textures

Random = Key[Array, ""]
Flag = Bool[Array, ""]
Field = Float[Array, "s s"]
Picture = Float[Array, "s s 3"]
Bank = UInt8[Array, "classes instances t t"] | UInt8[np.ndarray, "classes instances t t"]
Photos = UInt8[Array, "n h h 3"] | UInt8[np.ndarray, "n h h 3"]

_OBJECTS = 3
_DEFECTS = 2


class Scene(NamedTuple):
    """An image and its defects.

    Attributes:
      image: RGB.
      defect: defective fraction of each pixel.
    """

    image: Picture
    defect: Field


class _Canvas(NamedTuple):
    colour: Picture
    height: Field


def scene(key: Random, view: Random, good: Flag, bank: Bank, size: int) -> Scene:
    """Draw one image.

    Args:
      key: determines the objects, their materials, and the light.
      view: determines the differences between two photographs of them: exact positions, pieces
        of material, brightness and noise; and defects.
      good: whether to draw no defects.
      bank: textures to choose from.
      size: side of the image, at most that of the bank's textures.

    Returns:
      The image and its defects.
    """
    keys, views = jax.random.split(key, 4), jax.random.split(view, 5)
    canvas = _ground(keys[0], views[0], bank, size)
    there = jnp.arange(_OBJECTS) < jax.random.randint(keys[1], (), 0, _OBJECTS + 1)

    # A loop instead of unrolled steps, which XLA would fuse and compute partly twice.
    def place(canvas: _Canvas, which: tuple[Random, Random, Flag]) -> tuple[_Canvas, None]:
        return _placed(which[0], which[1], canvas, bank, size, which[2]), None

    own = jax.random.split(keys[2], _OBJECTS), jax.random.split(views[1], _OBJECTS), there
    canvas, _ = lax.scan(place, canvas, own)
    canvas, defect = _spoilt(views[2], canvas, bank, size, good)
    camera, light = jax.random.split(keys[3])
    lit = _lit(light, views[3], canvas)
    return Scene(_exposed(camera, views[4], lit), defect)


def photograph(
    key: Random, view: Random, good: Flag, photos: Photos, bank: Bank, size: int
) -> Scene:
    """Cut a piece from a photograph of something without defects, and sometimes add defects.

    Args:
      key: determines the piece: views of one key show the same place on different photographs.
      view: determines the photograph and the defects.
      good: whether to draw no defects.
      photos: photographs.
      bank: textures for defects.
      size: side of the image, at most the photographs'.

    Returns:
      The image and its defects.
    """
    views = jax.random.split(view, 3)
    which = jax.random.randint(views[0], (), 0, len(photos))
    top, left = jax.random.randint(key, (2,), 0, photos.shape[1] - size + 1)
    piece = lax.dynamic_slice(jnp.asarray(photos), (which, top, left, 0), (1, size, size, 3))[0]
    canvas = _Canvas(piece.astype(jnp.float32) / 255, jnp.zeros((size, size)))
    canvas, defect = _spoilt(views[1], canvas, bank, size, good)
    # The photograph includes its light; only the added defects have a relief.
    shade = 1 + jnp.clip(_slopes(canvas.height)[0], -0.5, 0.5)
    return Scene(jnp.clip(canvas.colour * shade[..., None], 0.0, 1.0), defect)


def _varied(key: Random, view: Random, count: int, by: float) -> Float[Array, " count"]:
    """Draw numbers in 0..1 that differ by at most half of `by` from view to view."""
    centre = jax.random.uniform(key, (count,))
    return jnp.clip(centre + by * (jax.random.uniform(view, (count,)) - 0.5), 0.0, 1.0)


# ---------------------------------------------------------------- materials


def _texture(key: Random, view: Random, bank: Bank, size: int) -> Field:
    """Cut a piece of any texture, standardised.

    Half of all materials are cut at a random position, the others at a fixed one.
    """
    classes, instances, side, _ = bank.shape
    keys, views = jax.random.split(key, 4), jax.random.split(view)
    which = jax.random.randint(keys[0], (), 0, classes)
    loose = jax.random.bernoulli(keys[1])

    def cut(one: Random, other: Random) -> Array:
        own = jax.random.randint(one, (), 0, instances)
        return jnp.append(own, jax.random.randint(other, (2,), 0, side - size + 1))

    in_place = cut(keys[2], keys[3])
    moved = jax.random.randint(views[1], (2,), -1, 2)
    in_place = in_place.at[1:].set(jnp.clip(in_place[1:] + moved, 0, side - size))
    instance, top, left = jnp.where(loose, cut(*views), in_place)
    piece = lax.dynamic_slice(
        jnp.asarray(bank), (which, instance, top, left), (1, 1, size, size)
    )
    return (piece[0, 0].astype(jnp.float32) - 127) / 51


def _colour(key: Random) -> Float[Array, "3"]:
    """Draw a colour of any brightness, mostly weakly saturated."""
    keys = jax.random.split(key, 3)
    grey = jax.random.uniform(keys[0], minval=0.03, maxval=0.97)
    saturation = jax.random.uniform(keys[1]) ** 2
    hue = jax.random.uniform(keys[2], (3,), minval=-1.0)
    return jnp.clip(grey + 0.7 * saturation * hue, 0.0, 1.0)


def _painted(key: Random, field: Field) -> Picture:
    """Colour a texture with three colours: for its dark, middle and bright parts."""
    keys = jax.random.split(key, 5)
    contrast = jax.random.uniform(keys[0], minval=0.25, maxval=1.0)
    dark, middle, bright = (_colour(k)[None, None] for k in keys[1:4])
    # Half of all are shades of one colour.
    plain = jax.random.bernoulli(keys[4])
    dark = jnp.where(plain, middle * 0.35, dark)
    bright = jnp.where(plain, 1 - (1 - middle) * 0.35, bright)
    dark, bright = middle + contrast * (dark - middle), middle + contrast * (bright - middle)
    t = jnp.clip(field / 2, -1.0, 1.0)[..., None]
    return middle + jnp.maximum(t, 0) * (bright - middle) + jnp.maximum(-t, 0) * (dark - middle)


def _ground(key: Random, view: Random, bank: Bank, size: int) -> _Canvas:
    keys = jax.random.split(key, 3)
    field = _texture(keys[0], view, bank, size)
    relief = jax.random.uniform(keys[2]) ** 2 * 1.5
    return _Canvas(_painted(keys[1], field), relief * field)


# ---------------------------------------------------------------- shapes


def _axes(size: int) -> tuple[Field, Field]:
    axis = jnp.arange(size, dtype=jnp.float32) + 0.5
    rows, columns = jnp.meshgrid(axis, axis, indexing="ij")
    return columns, rows


def _outline(key: Random, view: Random, size: int, low: float, high: float) -> Field:
    """Return the approximate distance to a shape's outline, negative inside; `view` moves it.

    A superformula (Gielis 2003) makes discs, ellipses, polygons, stars and petals; distorted by
    noise it makes stains. One in five is a bar.
    """
    keys = jax.random.split(key, 7)
    x, y = _axes(size)
    x0, y0 = jax.random.uniform(keys[0], (2,), maxval=float(size))
    dx, dy, dturn = jax.random.uniform(view, (3,), minval=-1.0)
    x0, y0 = x0 + 1.5 * dx, y0 + 1.5 * dy
    radius = low * (high / low) ** jax.random.uniform(keys[1])
    turn, stretch, symmetry, n1, n2, rough = jax.random.uniform(keys[2], (6,))
    stretch = 1.0 + 1.5 * jnp.maximum(0.0, stretch - 0.4)
    turn += 0.01 * dturn
    cos, sin = jnp.cos(2 * np.pi * turn), jnp.sin(2 * np.pi * turn)
    u, v = cos * (x - x0) + sin * (y - y0), cos * (y - y0) - sin * (x - x0)
    u, v = u / stretch, v * stretch
    angle = jnp.arctan2(v, u) * jnp.floor(symmetry * 8) / 4
    exponent = 0.6 * 20.0**n2
    c, s = jnp.abs(jnp.cos(angle)) + 1e-3, jnp.abs(jnp.sin(angle)) + 1e-3
    shape = (c**exponent + s**exponent) ** (-1 / (exponent * (0.5 + 2.5 * n1)))
    shape = jnp.clip(shape, 0.3, 1.6)
    seeds = jax.random.bits(keys[3], (1,))
    noise = textures.fractal_noise(x / radius * 2, y / radius * 2, seeds[0], 3) - 0.5
    bent = 1 + 1.2 * jnp.maximum(0.0, rough - 0.6) / 0.4 * noise
    distance = jnp.sqrt(u**2 + v**2 + 1e-6) - radius * shape * bent
    bar = jnp.abs(v) - radius * 0.6
    distance = jnp.where(jax.random.bernoulli(keys[4], 0.2), bar, distance)
    ring = jnp.abs(distance) - radius * 0.15
    return jnp.where(jax.random.bernoulli(keys[5], 0.15), ring, distance)


def _placed(
    key: Random,
    view: Random,
    canvas: _Canvas,
    bank: Bank,
    size: int,
    there: Flag,
) -> _Canvas:
    """Add one object on top of the canvas."""
    keys, views = jax.random.split(key, 4), jax.random.split(view)
    outline = _outline(keys[0], views[0], size, size / 10, size / 2)
    cover = jnp.clip(0.5 - outline, 0.0, 1.0) * there
    field = _texture(keys[1], views[1], bank, size)
    colour = _painted(keys[2], field)
    relief, dome, shadow, reach = jax.random.uniform(keys[3], (4,))
    # Round at the edges, with a shadow around it.
    round_ = dome**2 * 12 * textures.smooth(-outline / (2 + 10 * reach))
    height = 1.5 * relief**2 * field + round_
    dark = there * 0.6 * shadow * jnp.exp(-jnp.maximum(outline, 0.0) / (1 + 4 * reach))
    below = canvas.colour * (1 - dark)[..., None]
    return _Canvas(
        below + cover[..., None] * (colour - below),
        canvas.height + cover * (height - canvas.height),
    )


# ---------------------------------------------------------------- defects


def _spoilt(
    key: Random, canvas: _Canvas, bank: Bank, size: int, good: Flag
) -> tuple[_Canvas, Field]:
    """Add up to `_DEFECTS` small defects, and return where they are.

    Each is a spot or a scratch, in which the surface has another colour, is another
    material, comes from another place, is blurred, or is dented.
    """
    first, second = jax.random.split(key)
    there = jnp.arange(_DEFECTS) < jax.random.randint(first, (), 0, _DEFECTS + 1)
    there &= ~good

    def spoil(
        state: tuple[_Canvas, Field], which: tuple[Random, Flag]
    ) -> tuple[tuple[_Canvas, Field], None]:
        canvas, defect = state
        canvas, cover = _with_defect(which[0], canvas, bank, size, which[1])
        return (canvas, jnp.maximum(defect, cover)), None

    state = canvas, jnp.zeros((size, size))
    return lax.scan(spoil, state, (jax.random.split(second, _DEFECTS), there))[0]


def _with_defect(
    key: Random, canvas: _Canvas, bank: Bank, size: int, there: Flag
) -> tuple[_Canvas, Field]:
    """Add one defect, and return the pixels it covers."""
    keys = jax.random.split(key, 8)
    spot = _outline(keys[0], keys[0], size, 1.2, size / 5)
    scratch = _scratch(keys[1], size)
    where = jnp.where(jax.random.bernoulli(keys[2], 0.3), scratch, spot)
    cover = jnp.clip(0.5 - where, 0.0, 1.0) * there
    field = _texture(keys[3], keys[3], bank, size)
    tint = jnp.broadcast_to(_colour(keys[4]), canvas.colour.shape)
    kind = jax.random.randint(keys[6], (), 0, 6)
    other = jnp.select(
        [kind == n for n in range(5)],
        [
            tint,
            canvas.colour * tint,
            _painted(keys[5], field),
            canvas.colour[::-1, ::-1],
            _blur(canvas.colour, 5),
        ],
        canvas.colour,
    )
    opacity, depth = jax.random.uniform(keys[7], (2,), minval=0.3)
    colour = canvas.colour + (cover * opacity)[..., None] * (other - canvas.colour)
    # Defects that keep the colour are dented.
    dent = jnp.where(kind == 5, 6.0, 1.5) * (2 * depth - 1.3)
    height = canvas.height + dent * textures.smooth(0.5 - where / 3) * there
    return _Canvas(colour, height), cover


def _scratch(key: Random, size: int) -> Field:
    """Return the distance to a thin arc."""
    x, y = _axes(size)
    keys = jax.random.split(key, 2)
    x0, y0 = jax.random.uniform(keys[0], (2,), maxval=float(size))
    turn, bend, length, width = jax.random.uniform(keys[1], (4,))
    cos, sin = jnp.cos(2 * np.pi * turn), jnp.sin(2 * np.pi * turn)
    u, v = cos * (x - x0) + sin * (y - y0), cos * (y - y0) - sin * (x - x0)
    v = v + (bend - 0.5) * u**2 / size * 2
    half = size * (0.06 + 0.3 * length)
    return jnp.maximum(jnp.abs(v) - (0.4 + 1.2 * width), jnp.abs(u) - half)


# ---------------------------------------------------------------- light and camera


def _slopes(height: Field) -> tuple[Field, Field]:
    return (
        (jnp.roll(height, -1, 1) - jnp.roll(height, 1, 1)) / 2,
        (jnp.roll(height, -1, 0) - jnp.roll(height, 1, 0)) / 2,
    )


def _lit(key: Random, view: Random, canvas: _Canvas) -> Picture:
    """Apply diffuse light from one side, and some gloss."""
    azimuth, steep, ambient, gloss, exponent = _varied(key, view, 5, 0.1)
    slope_x, slope_y = _slopes(canvas.height)
    norm = jnp.sqrt(slope_x**2 + slope_y**2 + 1)
    light_x, light_y = jnp.cos(2 * np.pi * azimuth), jnp.sin(2 * np.pi * azimuth)
    up = 0.5 + 1.0 * steep
    level = jnp.sqrt(1 + up**2)
    facing = (-slope_x * light_x - slope_y * light_y + up) / norm / level
    ambient = 0.2 + 0.5 * ambient
    shade = ambient + (1 - ambient) * jnp.maximum(facing, 0.0) * level / up
    # Halfway between the light and a camera above (Blinn and Phong).
    half = jnp.sqrt(1 + (up + level) ** 2)
    mirrored = (-slope_x * light_x - slope_y * light_y + up + level) / norm / half
    shine = jnp.maximum(0.0, gloss - 0.5) * jnp.maximum(mirrored, 0.0) ** (10 + 90 * exponent)
    return canvas.colour * shade[..., None] + shine[..., None]


def _blur(picture: Picture, width: int) -> Picture:
    """Return the mean of a square around each pixel."""
    window = (width, width, 1)
    total = lax.reduce_window(picture, 0.0, lax.add, window, (1, 1, 1), "SAME")
    return total / width**2


def _exposed(key: Random, view: Random, picture: Picture) -> Picture:
    """Apply uneven light, blur, tone, tint and noise of a camera."""
    size = len(picture)
    keys, views = jax.random.split(key), jax.random.split(view)
    blur, gain, gamma, dx, dy, noise = _varied(keys[0], views[0], 6, 0.2)
    x, y = _axes(size)
    falloff = 1 + 0.5 * ((dx - 0.5) * (x / size - 0.5) + (dy - 0.5) * (y / size - 0.5))
    picture = picture * falloff[..., None] * (0.75 + 0.5 * gain)
    tint = 1 + 0.08 * jax.random.normal(keys[1], (3,))
    picture = jnp.clip(picture * tint[None, None], 0.0, 1.0) ** (0.7 + 0.7 * gamma)
    amount = 0.8 * jnp.maximum(0.0, blur * 1.4 - 0.4)
    picture = picture + amount * (_blur(picture, 3) - picture)
    grain = 0.04 * noise**2 * jax.random.normal(views[1], picture.shape)
    return jnp.clip(picture + grain, 0.0, 1.0)
