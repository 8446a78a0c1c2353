"""Procedural textures: height fields of many kinds, as pure functions of random keys.

A family is a way to draw (gratings, cells, weaves ...); a class is one choice of a family's
parameters; an instance is one picture of a class, with its own position, angle, scale and
noise. `bank` draws some instances of many classes once, which `scenes` then cuts, colours,
lights and composes anew for each training image.

Lengths are in pixels, angles in radians. If a family needs a random number for each
point of a lattice, it hashes the point: no tables, no borders.

All families map (kind, look, x, y) to a height field (s, s): `kind` determines the class,
`look` the noise, and x, y (s, s) are the coordinates of the pixels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped, UInt8, UInt32

Random = Key[Array, ""]
Field = Float[Array, "s s"]
Number = Float[Array, ""]

NEIGHBOURS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
# Instances drawn at once: bounds memory, does not change results.
_AT_ONCE = 64


def bank(
    key: Random,
    classes: int,
    instances: int,
    size: int,
    drawn: Callable[[int], object] = lambda _: None,
) -> UInt8[np.ndarray, "classes instances size size"]:
    """Draw textures of mean 127 and standard deviation 51 each, except where they saturate.

    Args:
      key: determines all textures.
      classes: number of classes, distributed evenly over `FAMILIES`.
      instances: number of pictures of each class.
      size: side of a picture in pixels.
      drawn: called with the number of additional classes drawn.

    Returns:
      (classes, instances, size, size) uint8.
    """
    kinds = jax.vmap(lambda c: jax.random.fold_in(key, c))(np.arange(classes))
    looks = jax.vmap(lambda kind: jax.random.split(kind, instances))(kinds)
    found = np.empty((classes, instances, size, size), np.uint8)
    for f, family in enumerate(FAMILIES):
        own = np.arange(f, classes, len(FAMILIES))
        if len(own):
            pairs = jnp.repeat(kinds[own], instances), looks[own].reshape(-1)
            fields = _draw_all(family, size, *pairs)
            found[own] = np.asarray(fields).reshape(len(own), instances, size, size)
            drawn(len(own))
    return found


def _draw_all(
    family: Callable[..., Field],
    size: int,
    kinds: Shaped[Array, " n"],
    looks: Shaped[Array, " n"],
) -> UInt8[Array, "n size size"]:
    def draw(pair: tuple[Random, Random]) -> UInt8[Array, "size size"]:
        return texture(family, *pair, size)

    return jax.jit(lambda *pairs: lax.map(draw, pairs, batch_size=_AT_ONCE))(kinds, looks)


def texture(
    family: Callable[..., Field], kind: Random, look: Random, size: int
) -> UInt8[Array, "size size"]:
    """Draw one instance.

    Args:
      family: one of `FAMILIES`.
      kind: determines the texture: the same for all instances of a class.
      look: determines position, scale, angle, and all noise.
      size: side of the picture in pixels.

    Returns:
      (size, size) uint8.
    """
    own, warping, grain = jax.random.split(kind, 3)
    place, noise = jax.random.split(look)
    x, y = _pose(place, size)
    # Some classes are distorted, some grainy, each to its own degree.
    amount, reach, rough, strength = jax.random.uniform(warping, (4,))
    seeds = jax.random.bits(jax.random.fold_in(noise, 0), (4,))
    bent = jnp.maximum(0.0, amount - 0.5) * 24.0
    far = 12.0 + 40.0 * reach
    u = x + bent * (fractal_noise(x / far, y / far, seeds[0], 2) - 0.5)
    v = y + bent * (fractal_noise(x / far, y / far, seeds[1], 2) - 0.5)
    field = _standardised(family(own, jax.random.fold_in(noise, 1), u, v))
    dirt = fractal_noise(x / (2.0 + 30.0 * rough), y / (2.0 + 30.0 * rough), seeds[2], 3)
    field += jnp.maximum(0.0, strength - 0.4) * 1.5 * _standardised(dirt)
    # Some are mostly bright, some mostly dark.
    bias = jax.random.uniform(grain, minval=-0.7, maxval=0.7)
    field = _standardised(field)
    field = _standardised(field + bias * field**2 * 0.5)
    return jnp.clip(jnp.round(127.0 + 51.0 * field), 0, 255).astype(jnp.uint8)


def _pose(key: Random, size: int) -> tuple[Field, Field]:
    """Return the coordinates of the pixels in an instance's pose."""
    keys = jax.random.split(key, 3)
    angle = jax.random.uniform(keys[0], maxval=2 * np.pi)
    scale = jnp.exp2(jax.random.uniform(keys[1], minval=-0.5, maxval=0.5))
    x0, y0 = jax.random.uniform(keys[2], (2,), minval=0.0, maxval=4000.0)
    axis = jnp.arange(size, dtype=jnp.float32) - size / 2
    rows, columns = jnp.meshgrid(axis, axis, indexing="ij")
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    return x0 + cos * columns + sin * rows, y0 + cos * rows - sin * columns


def _standardised(field: Field) -> Field:
    field = field - jnp.mean(field)
    return field / jnp.sqrt(jnp.mean(field**2) + 1e-6)


def hashed(i: Float[Array, "*n"], j: Float[Array, "*n"], seed: UInt32[Array, ""]) -> Array:
    """Return pseudo-random numbers in [0, 1) of lattice points, by hashing.

    Args:
      i: first lattice coordinate.
      j: second lattice coordinate.
      seed: seed of the hash.

    Returns:
      float32 of the coordinates' shape; equal points have equal numbers.
    """
    a = i.astype(jnp.int32).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    b = j.astype(jnp.int32).astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    h = a ^ (b + seed)
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h = (h ^ (h >> 12)) * jnp.uint32(0x297A2D39)
    h = h ^ (h >> 15)
    return (h >> 8).astype(jnp.float32) / 2**24


def value_noise(x: Field, y: Field, seed: UInt32[Array, ""]) -> Field:
    """Return smooth noise in [0, 1] whose knots are 1 apart.

    Args:
      x: horizontal coordinates.
      y: vertical coordinates.
      seed: seed of the knots.

    Returns:
      (s, s).
    """
    i, j = jnp.floor(x), jnp.floor(y)
    u, v = smooth(x - i), smooth(y - j)
    top = (1 - u) * hashed(i, j, seed) + u * hashed(i + 1, j, seed)
    bottom = (1 - u) * hashed(i, j + 1, seed) + u * hashed(i + 1, j + 1, seed)
    return (1 - v) * top + v * bottom


def fractal_noise(
    x: Field, y: Field, seed: UInt32[Array, ""], octaves: int, gain: Number | float = 0.5
) -> Field:
    """Return value noise of several scales (fractional Brownian motion), in [0, 1].

    Args:
      x: horizontal coordinates.
      y: vertical coordinates.
      seed: seed of the noise.
      octaves: number of scales.
      gain: ratio of successive amplitudes.

    Returns:
      (s, s).
    """
    total, weight, amplitude = jnp.zeros_like(x), jnp.float32(0), jnp.float32(1)
    for n in range(octaves):
        total += amplitude * value_noise(x * 2**n, y * 2**n, seed + jnp.uint32(n))
        weight, amplitude = weight + amplitude, amplitude * gain
    return total / weight


def smooth(t: Array) -> Array:
    """Return a smooth step from 0 at 0 to 1 at 1."""
    t = jnp.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _uniform(key: Random, count: int, low: float = 0.0, high: float = 1.0) -> Array:
    return jax.random.uniform(key, (count,), minval=low, maxval=high)


def _between(t: Number, low: float, high: float) -> Number:
    """Map 0..1 to low..high, evenly in the logarithm."""
    return low * (high / low) ** t


# ---------------------------------------------------------------- families


def spectral_noise(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw noise of a power-law spectrum in a band, stretched along a direction."""
    slope, low, band, stretch, turn = _uniform(kind, 5)
    size = len(x)
    # The pose, derived from the coordinates, acts on frequencies.
    cos, sin = (x[0, -1] - x[0, 0]) / (size - 1), (y[0, -1] - y[0, 0]) / (size - 1)
    angle = jnp.arctan2(-sin, cos) + np.pi * turn
    scale = jnp.clip(jnp.sqrt(cos**2 + sin**2), 0.5, 2.0)
    fy, fx = jnp.meshgrid(jnp.fft.fftfreq(size), jnp.fft.rfftfreq(size), indexing="ij")
    along = (jnp.cos(angle) * fx + jnp.sin(angle) * fy) / scale
    across = (jnp.cos(angle) * fy - jnp.sin(angle) * fx) / scale
    ratio = _between(jnp.maximum(0.0, stretch * 2 - 1), 1.0, 8.0)
    f = jnp.sqrt((along * ratio) ** 2 + across**2) + 1e-4
    lowest = _between(low, 0.01, 0.2)
    highest = lowest * _between(band, 1.5, 20.0)
    amplitude = f ** (-2.0 * slope) / (1 + (lowest / f) ** 4) / (1 + (f / highest) ** 6)
    white = jnp.fft.rfft2(jax.random.normal(look, x.shape))
    return jnp.fft.irfft2(white * amplitude, x.shape)


def clouds(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw fractal noise, folded into ridges and billows."""
    far, gain, ridge, power = _uniform(kind, 4)
    seeds = jax.random.bits(look, (2,))
    far = _between(far, 6.0, 40.0)
    noise = fractal_noise(x / far, y / far, seeds[0], 5, 0.35 + 0.45 * gain) * 2 - 1
    folded = jnp.where(
        ridge < 0.33, noise, jnp.where(ridge < 0.66, jnp.abs(noise), -jnp.abs(noise))
    )
    return jnp.sign(folded) * jnp.abs(folded) ** _between(power, 0.5, 2.0)


def gratings(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw one to three gratings, soft or sharp, added or multiplied."""
    del look
    keys = jax.random.split(kind, 3)
    period, angle, sharp = (_uniform(key, 3) for key in keys)
    number, product, warp = _uniform(jax.random.fold_in(kind, 1), 3)
    total, multiplied = jnp.zeros_like(x), jnp.ones_like(x)
    for n in range(3):
        direction = np.pi * angle[n]
        phase = (jnp.cos(direction) * x + jnp.sin(direction) * y) / _between(
            period[n], 3.0, 28.0
        )
        if n > 0:
            phase += warp * 0.3 * total
        wave = jnp.tanh(_between(sharp[n], 0.3, 8.0) * jnp.sin(2 * np.pi * phase))
        there = number * 3 > n
        total += jnp.where(there, wave, 0.0)
        multiplied *= jnp.where(there, wave, 1.0)
    return jnp.where(product > 0.7, multiplied, total)


def _lattice_distances(
    x: Field, y: Field, jitter: Number, seed: UInt32[Array, ""], power: Number
) -> tuple[Field, Field, Field]:
    """Return distances to the two nearest of jittered points, and the nearest's hash."""
    i, j = jnp.floor(x), jnp.floor(y)
    first, second = jnp.full_like(x, 9.0), jnp.full_like(x, 9.0)
    nearest = jnp.zeros_like(x)
    for di, dj in NEIGHBOURS:
        px = i + di + 0.5 + jitter * (hashed(i + di, j + dj, seed) - 0.5)
        py = j + dj + 0.5 + jitter * (hashed(i + di, j + dj, seed + jnp.uint32(1)) - 0.5)
        far = (jnp.abs(x - px) ** power + jnp.abs(y - py) ** power) ** (1 / power)
        nearest = jnp.where(far < first, hashed(i + di, j + dj, seed + jnp.uint32(2)), nearest)
        second = jnp.minimum(second, jnp.maximum(first, far))
        first = jnp.minimum(first, far)
    return first, second, nearest


def cells(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw cellular (Worley) noise: cobbles, scales, foam."""
    far, jitter, power, a, b, c = _uniform(kind, 6)
    far = _between(far, 6.0, 24.0)
    seed = jax.random.bits(look)
    first, second, own = _lattice_distances(
        x / far, y / far, 0.2 + 0.8 * jitter, seed, 1.0 + 2.0 * power
    )
    return (a - 0.5) * first + (b - 0.3) * (second - first) + jnp.maximum(0, c - 0.4) * own


def cracks(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw thin lines between cells, on their own ground."""
    far, jitter, width, ground, step = _uniform(kind, 5)
    far = _between(far, 10.0, 40.0)
    seeds = jax.random.bits(look, (2,))
    first, second, own = _lattice_distances(
        x / far, y / far, 0.3 + 0.7 * jitter, seeds[0], jnp.float32(2)
    )
    width = _between(width, 0.6, 4.0) / far
    line = 1 - smooth((second - first) / width)
    noise = fractal_noise(x / 4, y / 4, seeds[1], 3)
    return line * jnp.where(step > 0.5, 1.0, -1.0) * 2 + ground * noise + 0.5 * own * step


def tiles(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw bricks and tiles with joints, each with its own brightness."""
    width, ratio, shift, joint, own, bevel = _uniform(kind, 6)
    width = _between(width, 7.0, 32.0)
    height = width / _between(ratio, 1.0, 3.0)
    row = jnp.floor(y / height)
    u = x / width + jnp.where(shift > 0.5, 0.5, 0.0) * row
    column = jnp.floor(u)
    inside_x = jnp.minimum(u - column, 1 - u + column) * width
    inside_y = jnp.minimum(y / height - row, 1 - y / height + row) * height
    edge = jnp.minimum(inside_x, inside_y)
    joint = _between(joint, 0.5, 2.5)
    field = smooth((edge - joint) / (0.5 + 3 * bevel))
    return field + own * 1.2 * hashed(column, row, jax.random.bits(look))


def weave(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw cloth: threads over and under each other, plain, twill or satin."""
    period, ratio, over, step, width, fibre = _uniform(kind, 6)
    period = _between(period, 3.5, 14.0)
    u, v = x / period, y / (period * _between(ratio, 0.6, 1.6))
    i, j = jnp.floor(u), jnp.floor(v)
    repeat = 2 + jnp.floor(over * 3)
    above = jnp.mod(i + (1 + jnp.floor(step * 2)) * j, repeat) < jnp.floor(repeat / 2)
    warp, weft = jnp.cos(np.pi * (u - i - 0.5)), jnp.cos(np.pi * (v - j - 0.5))
    gap = 0.6 * width
    warp_there, weft_there = warp > gap, weft > gap
    top = jnp.where(above, warp_there, ~weft_there & warp_there)
    field = jnp.where(
        top, warp + 0.6 * jnp.where(above, weft, 0.0), weft + 0.6 * jnp.where(above, 0.0, warp)
    )
    field = jnp.where(warp_there | weft_there, field, -0.6)
    strands = value_noise(
        jnp.where(top, x * 1.5, x / 6), jnp.where(top, y / 6, y * 1.5), jax.random.bits(look)
    )
    return field + 0.7 * fibre * strands


def dots(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw dots, rings, squares and diamonds on a more or less regular lattice."""
    far, jitter, power, radius, ring, spread, soft, bright = _uniform(kind, 8)
    far = _between(far, 6.0, 24.0)
    seed = jax.random.bits(look)
    first, _, own = _lattice_distances(
        x / far, y / far, jnp.maximum(0.0, jitter * 1.4 - 0.4), seed, _between(power, 1.0, 6.0)
    )
    radius = (0.18 + 0.27 * radius) * (1 - jnp.maximum(0.0, spread - 0.4) * own)
    edge = jnp.where(ring > 0.7, jnp.abs(first - radius) - 0.07, first - radius)
    disc = 1 - smooth(edge * far / (0.8 + 3 * soft) + 0.5)
    return jnp.where(bright > 0.5, 1.0, -1.0) * disc * (1 + 0.5 * own)


def glyphs(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw one sign of random strokes, repeatedly."""
    far, jitter, turned, width = _uniform(kind, 4)
    ends = _uniform(jax.random.fold_in(kind, 1), 12, -0.36, 0.36).reshape(3, 4)
    far = _between(far, 12.0, 32.0)
    seeds = jax.random.bits(look, (3,))
    u, v = x / far, y / far
    i, j = jnp.floor(u), jnp.floor(v)
    du = u - i - 0.5 + 0.2 * jitter * (hashed(i, j, seeds[0]) - 0.5)
    dv = v - j - 0.5 + 0.2 * jitter * (hashed(i, j, seeds[1]) - 0.5)
    angle = jnp.where(turned > 0.6, 2 * np.pi * hashed(i, j, seeds[2]), 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    du, dv = cos * du + sin * dv, cos * dv - sin * du
    nearest = jnp.full_like(x, 9.0)
    for x0, y0, x1, y1 in ends:
        nearest = jnp.minimum(nearest, _to_segment(du, dv, x0, y0, x1, y1))
    return 1 - smooth((nearest * far - _between(width, 0.4, 3.0)) / 1.2)


def _to_segment(x: Field, y: Field, x0: Array, y0: Array, x1: Array, y1: Array) -> Field:
    """Return distances to a line segment."""
    dx, dy = x1 - x0, y1 - y0
    t = jnp.clip(((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6), 0.0, 1.0)
    return jnp.sqrt((x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2 + 1e-12)


def strokes(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw fibres and scratches, along one direction or all."""
    far, spread, length, width, levels = _uniform(kind, 5)
    far = _between(far, 4.0, 16.0)
    seed = jax.random.bits(look)
    u, v = x / far, y / far
    i, j = jnp.floor(u), jnp.floor(v)
    field = jnp.zeros_like(x)
    for di, dj in NEIGHBOURS:
        a, b = i + di, j + dj
        px = a + hashed(a, b, seed)
        py = b + hashed(a, b, seed + jnp.uint32(1))
        angle = spread**2 * np.pi * (2 * hashed(a, b, seed + jnp.uint32(2)) - 1)
        reach = 0.3 + 0.6 * length
        cos, sin = jnp.cos(angle) * reach, jnp.sin(angle) * reach
        near = _to_segment(u, v, px - cos, py - sin, px + cos, py + sin) * far
        own = 1 - levels * hashed(a, b, seed + jnp.uint32(3))
        line = own * (1 - smooth((near - 0.3) / _between(width, 0.6, 2.5)))
        field = jnp.maximum(field, line)
    return field


def rings(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw wood and marble: bands or rings, distorted by noise."""
    period, bend, far, sharp, centred, fine = _uniform(kind, 6)
    seeds = jax.random.bits(look, (2,))
    period, far = _between(period, 5.0, 24.0), _between(far, 16.0, 60.0)
    noise = fractal_noise(x / far, y / far, seeds[0], 4) - 0.5
    distance = jnp.sqrt((x - x[32, 5] - 60) ** 2 + (y - y[32, 5] - 40) ** 2 + 1.0)
    phase = jnp.where(centred > 0.5, distance, x) / period + bend * 4 * noise
    saw = phase - jnp.floor(phase)
    wave = jnp.where(sharp > 0.5, saw, jnp.sin(2 * np.pi * phase))
    return wave + fine * fractal_noise(x * 0.7, y / 12, seeds[1], 2)


def julia(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw escape times of a Julia set: an outline at all scales."""
    del look
    turn, radius, zoom, cap = _uniform(kind, 4)
    angle = 2 * np.pi * turn
    c_re, c_im = (
        (0.68 + 0.12 * radius) * jnp.cos(angle),
        (0.68 + 0.12 * radius) * jnp.sin(angle),
    )
    side = _between(zoom, 24.0, 90.0)
    # Sets side by side, every second one mirrored: unbounded and seamless.
    re = jnp.abs(jnp.mod(x / side, 4.0) - 2.0) * 1.3 - 1.3
    im = jnp.abs(jnp.mod(y / side, 4.0) - 2.0) * 1.3 - 1.3

    def step(_: Array, state: tuple[Field, Field, Field]) -> tuple[Field, Field, Field]:
        re, im, count = state
        inside = re * re + im * im < 16.0
        new_re, new_im = re * re - im * im + c_re, 2 * re * im + c_im
        return (
            jnp.where(inside, new_re, re),
            jnp.where(inside, new_im, im),
            count + inside,
        )

    re, im, count = lax.fori_loop(0, 24, step, (re, im, jnp.zeros_like(re)))
    escaped = count - jnp.log2(jnp.maximum(jnp.log2(re * re + im * im + 2.0), 1e-3))
    return jnp.clip(escaped, 0.0, 6.0 + 18.0 * cap) ** 0.5


def reaction_diffusion(kind: Random, look: Random, x: Field, y: Field) -> Field:
    """Draw self-organising stripes, spots and labyrinths (Swift and Hohenberg 1977).

    u' = r u - (1 + laplacian)^2 u + g u^2 - u^3, in Fourier space, the linear part implicit.
    """
    wavelength, growth, quadratic, stretch = _uniform(kind, 4)
    size = len(x)
    cos, sin = (x[0, -1] - x[0, 0]) / (size - 1), (y[0, -1] - y[0, 0]) / (size - 1)
    angle = jnp.arctan2(-sin, cos)
    scale = jnp.clip(jnp.sqrt(cos**2 + sin**2), 0.5, 2.0)
    fy, fx = jnp.meshgrid(jnp.fft.fftfreq(size), jnp.fft.rfftfreq(size), indexing="ij")
    wavelength = _between(wavelength, 5.0, 22.0)
    ratio = _between(jnp.maximum(0.0, stretch * 2 - 1), 1.0, 2.5)
    along = (jnp.cos(angle) * fx + jnp.sin(angle) * fy) * ratio
    across = jnp.cos(angle) * fy - jnp.sin(angle) * fx
    k2 = (along**2 + across**2) * (wavelength / scale) ** 2
    r, g = 0.2 + 0.6 * growth, 1.6 * (quadratic * 2 - 1)
    time = 0.5
    linear = 1 / (1 - time * (r - (1 - k2) ** 2))

    def step(_: Array, u: Field) -> Field:
        change = jnp.fft.rfft2(u + time * (g * u**2 - u**3))
        return jnp.clip(jnp.fft.irfft2(change * linear, u.shape), -3.0, 3.0)

    return lax.fori_loop(0, 60, step, 0.3 * jax.random.normal(look, x.shape))


FAMILIES: tuple[Callable[[Random, Random, Field, Field], Field], ...] = (
    spectral_noise,
    clouds,
    gratings,
    cells,
    cracks,
    tiles,
    weave,
    dots,
    glyphs,
    strokes,
    rings,
    julia,
    reaction_diffusion,
)
