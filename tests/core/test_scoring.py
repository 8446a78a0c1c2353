"""Distances, maps and scores against float64 NumPy, SciPy and PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
from scipy import ndimage

from padim_jax.core import embedding, gaussian, low_rank, scoring
from padim_jax.core.scoring import anomaly_maps, mahalanobis
from padim_jax.core.types import Gaussian, LowRank

# One float32 product per axis, over at most 20 samples of the grid or 33 of the blur: an
# output is off by less than 2 * 33 * 2^-24 = 4e-6 of the largest distance, here 10.
# Measured at most 2.4e-6.
ROUNDING = 4e-5

# Grid and map sizes: PaDiM's own, rectangular, and ratios that are no integers.
SIZES = {
    "4x": ((14, 14), (56, 56)),
    "rectangular": ((9, 16), (36, 64)),
    "2x and 5x": ((16, 5), (32, 25)),
    "ratios 4.3 and 2.7": ((7, 13), (30, 35)),
    "one patch": ((1, 1), (5, 6)),
    "two by one": ((2, 1), (9, 4)),
    "same size": ((8, 6), (8, 6)),
}
sizes = pytest.mark.parametrize(("grid", "size"), SIZES.values(), ids=SIZES.keys())


def random_distances(grid, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(0, 10, (batch, *grid)).astype(np.float32)


def maps_of(on_grid, size, upsample="bilinear", sigma=0.0):
    batch, *grid = on_grid.shape
    distances = jnp.asarray(on_grid, jnp.float32).reshape(batch, -1)
    return np.asarray(anomaly_maps(distances, tuple(grid), size, upsample, sigma))


def hat(t):
    return np.maximum(1 - np.abs(t), 0)


def keys(t, a=-0.75):
    """Cubic convolution (Keys 1981, eq. 4) with PyTorch's and OpenCV's a."""
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def resampled(x, size, kernel):
    """Last axis: all samples, edges repeated for ever, weighted by the kernel."""
    n = x.shape[-1]
    centre = (np.arange(size) + 0.5) * n / size - 0.5
    position = np.arange(-3, n + 3)
    return x[..., np.clip(position, 0, n - 1)] @ kernel(centre[None] - position[:, None])


def random_parts(pyramid, *after, seed=0):
    """(r, n, d, *after) a level."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=(*shape, *after)), jnp.float32) for shape in pyramid.shapes
    )


def deviations_from(mean, levels, pyramid):
    """(b, p, d) float64"""
    x = [patchwise.vectors([level[..., i] for level in levels], pyramid) for i in range(4)]
    return np.stack(x) - patchwise.vectors(mean, pyramid)


def distances(fitted, levels, pyramid):
    return scoring.on_grid(jax.jit(mahalanobis)(fitted, levels), pyramid.patches)


def assert_products_of_float32(fitted, levels, pyramid):
    """On GPUs, too, which multiply in TF32, of a 10-bit mantissa, unless told not to."""

    def score(fitted, levels):
        found = scoring.on_grid(mahalanobis(fitted, levels), pyramid.patches)
        side = found.shape[1]
        return anomaly_maps(found, (side, 1), (side, 5), "bilinear", 1.0)

    found = patchwise.products(score, fitted, levels)
    assert len(found) >= 3
    assert all("HIGHEST, HIGHEST" in product for product in found)


on_all_pyramids = pytest.mark.parametrize("name", patchwise.KINDS)


@on_all_pyramids
def test_distance_is_that_of_the_dense_factor(name):
    pyramid = patchwise.lay(patchwise.CASES[name])
    rng, channels = np.random.default_rng(1), [d for _, _, d in pyramid.shapes]
    factor = []
    for i, shape in enumerate(pyramid.shapes):
        own = np.tril(rng.normal(size=(*shape, shape[-1]))) / 4 + np.eye(shape[-1])
        cross = [rng.normal(size=(*shape, d)) / 4 for d in channels[i + 1 :]]
        factor.append(tuple(jnp.asarray(x, jnp.float32) for x in (np.linalg.inv(own), *cross)))
    mean, levels = random_parts(pyramid), random_parts(pyramid, 4, seed=2)
    fitted = Gaussian(mean, tuple(factor))
    found = distances(fitted, levels, pyramid)
    assert_products_of_float32(fitted, levels, pyramid)
    delta = deviations_from(mean, levels, pyramid)
    dense = patchwise.factors(factor, pyramid)
    expected = np.linalg.norm(np.linalg.solve(dense, np.moveaxis(delta, 0, -1)), axis=1).T
    # Sums of up to 9 terms, amplified by L's condition number of up to 7; measured 2e-7.
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@on_all_pyramids
def test_distance_is_that_of_the_dense_samples(name):
    pyramid = patchwise.lay(patchwise.CASES[name])
    images, epsilon = 4, 0.25
    mean, levels = random_parts(pyramid), random_parts(pyramid, 4, seed=2)
    deviations = tuple(jnp.swapaxes(x, 2, 3) for x in random_parts(pyramid, images, seed=3))
    x = np.stack(
        [patchwise.vectors([y[:, :, i] for y in deviations], pyramid) for i in range(images)], 1
    )
    kernel = x @ x.swapaxes(1, 2) + (images - 1) * epsilon * np.eye(images)
    # Cells that no patch has hold what would be noticed.
    regions, cells, _ = pyramid.shapes[0]
    root = np.full((regions * cells, images, images), np.nan, np.float32)
    root[pyramid.patches] = np.linalg.inv(np.linalg.cholesky(kernel))
    root = jnp.asarray(root.reshape(regions, cells, images, images))
    fitted = LowRank(mean, deviations, root, jnp.float32(epsilon))
    found = distances(fitted, levels, pyramid)
    assert_products_of_float32(fitted, levels, pyramid)
    covariance = x.swapaxes(1, 2) @ x / (images - 1) + epsilon * np.eye(x.shape[-1])
    delta = np.moveaxis(deviations_from(mean, levels, pyramid), 0, -1)
    expected = np.sqrt(np.sum(delta * np.linalg.solve(covariance, delta), axis=1)).T
    # Roundoffs of |delta|^2 / epsilon, several times the squared distance; measured 2e-6.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@on_all_pyramids
def test_distances_come_into_the_patches_order(name):
    pyramid = patchwise.lay(patchwise.CASES[name])
    regions, cells, _ = pyramid.shapes[0]
    by_region = np.arange(regions * cells * 2.0).reshape(regions, cells, 2)
    # Devices that do not divide the regions have more at the end, of no patch.
    by_region = np.pad(by_region, ((0, 3), (0, 0), (0, 0)), constant_values=np.nan)
    found = scoring.on_grid(jnp.asarray(by_region, jnp.float32), pyramid.patches)
    np.testing.assert_array_equal(found, [2 * pyramid.patches, 2 * pyramid.patches + 1])


def test_a_rough_kernel_is_no_worse_than_its_square():
    # An image that the samples explain but for the regularization, and a kernel that is off
    # by 1 in 1000: so would be what is left of |delta|^2 = 9, and this is beside 1.8e-3.
    deviations = jnp.array([3.0, -3.0]).reshape(1, 1, 2, 1)
    kernel = np.array([[9.0, -9.0], [-9.0, 9.0]]) + 1e-4 * np.eye(2)
    root = np.linalg.inv(np.linalg.cholesky(1.001 * kernel))
    root = jnp.asarray(root, jnp.float32)[None, None]
    fitted = LowRank((jnp.ones((1, 1, 1)),), (deviations,), root, jnp.float32(1e-4))
    found = mahalanobis(fitted, (jnp.full((1, 1, 1, 1), 4.0),))
    # (4 - 1)^2 / (18 + 1e-4), but for 1e-3^2 * 9 / 1e-4 at most.
    np.testing.assert_allclose(found[0, 0, 0] ** 2, 9 / (18 + 1e-4), atol=0.1)


def test_distance_counts_standard_deviations():
    deviation = np.array([0.5, 2.0, 4.0])
    inverse = jnp.asarray(np.diag(1 / deviation), jnp.float32)[None, None]
    fitted = Gaussian((jnp.ones((1, 1, 3)),), ((inverse,),))
    x = 1 + np.stack([np.zeros(3), [0.5, 0, 0], [0, -6, 0], [1, 2, -8], deviation])
    found = mahalanobis(fitted, (jnp.asarray(x.T[None, None], jnp.float32),))
    # Squares of small whole numbers: exact, up to the square root's rounding.
    np.testing.assert_allclose(found[0, 0], np.sqrt([0, 1, 9, 4 + 1 + 4, 3]), rtol=2e-7)


def left_out(
    form: str, x: list[np.ndarray], shapes: Any, regularization: float, size: int
) -> np.ndarray:
    """Distances by region of all images of `x`, from statistics of them all."""
    images = x[0].shape[-1]
    epsilon = regularization * (images - size - 1) / (images - 1)
    return np.asarray(_leave_out(fit(form, x, shapes, epsilon), tuple(x), images, size))


_leave_out = jax.jit(scoring.leave_out, static_argnums=3)


# Fewer images than the 9 channels and more; with groups of one and more, and with a rest.
@pytest.mark.parametrize(("images", "size"), [(3, 1), (30, 1), (5, 3), (11, 4)], ids=str)
@pytest.mark.parametrize("form", ["moments", "samples"])
def test_left_out_is_what_a_refit_without_the_group_gives(form: str, images: int, size: int):
    case = patchwise.CASES["three levels"]
    pyramid = patchwise.lay(case)
    levels, x = patchwise.random_levels(case, images)
    whole = images - images % size
    for regularization in (1e-4, 0.01, 1.0):
        found = left_out(form, levels, pyramid.shapes, regularization, size)
        found = np.asarray(scoring.on_grid(jnp.asarray(found), pyramid.patches))
        for start in range(0, whole, size):
            group = slice(start, start + size)
            others = np.delete(x, group, 0)
            squared, _ = patchwise.distances(others, x[group], regularization)
            left = _least_left(x, group, regularization)
            # Roundoffs of the factors and of what is subtracted from 1; measured at most 54.
            # Those of the kernel's inverse count squared, times its condition: at most 32.
            lost = 128 * 2.0**-24
            if form == "samples":
                lost += 64 * (_condition(x, regularization) * 2.0**-24) ** 2
            off = np.abs(found[group] / np.sqrt(squared) - 1)
            assert np.all(off <= lost / left)
        assert not np.any(found[whole:])


def _condition(x: np.ndarray, regularization: float) -> np.ndarray:
    """Of each patch's kernel, from all images (p,)."""
    delta = np.moveaxis(x - x.mean(axis=0), 1, 0).astype(np.float64)
    largest = np.linalg.norm(delta, ord=2, axis=(1, 2)) ** 2
    return 1 + largest / ((len(x) - 1) * regularization)


def _least_left(x: np.ndarray, group: slice, regularization: float) -> np.ndarray:
    """Of each patch the least eigenvalue of 1 - W^(1/2) Q W^(1/2), from all images (p,)."""
    n, x = len(x), x.astype(np.float64)
    delta = np.moveaxis(x - x.mean(axis=0), 1, 0)  # (p, n, d)
    d = delta[:, group]
    m = n - d.shape[1]
    b = delta.swapaxes(1, 2) @ delta + (m - 1) * regularization * np.eye(x.shape[-1])
    q = d @ np.linalg.solve(b, d.swapaxes(1, 2))
    return np.real(np.linalg.eigvals(np.eye(d.shape[1]) - q - q.sum(2, keepdims=True) / m)).min(
        1
    )


def grid_of(name: str) -> tuple[int, int]:
    (height, width, _), *_ = patchwise.CASES[name][0]
    return height, width


def nearest_distance(
    training: np.ndarray,
    x: np.ndarray,
    grid: tuple[int, int],
    radius: int,
    epsilon: float,
    inside: np.ndarray | None = None,
) -> np.ndarray:
    """Of each patch the smallest distance of a nearby patch's embedding to its Gaussian."""
    found = np.full((len(x), *grid), np.inf)
    cells = x.reshape(len(x), *grid, -1)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            to_y, to_x = (
                slice(max(-d, 0), n + min(-d, 0)) for d, n in zip((dy, dx), grid, strict=True)
            )
            of_y, of_x = (
                slice(max(d, 0), n + min(d, 0)) for d, n in zip((dy, dx), grid, strict=True)
            )
            if not cells[:, of_y, of_x].size:
                continue
            moved = np.zeros_like(cells)
            moved[:, to_y, to_x] = cells[:, of_y, of_x]
            squared, _ = patchwise.distances(training, moved.reshape(x.shape), epsilon)
            near = squared.reshape(found.shape)[:, to_y, to_x]
            if inside is not None:  # patches outside are not compared
                near = np.where(inside[of_y, of_x], near, np.inf)
            found[:, to_y, to_x] = np.minimum(found[:, to_y, to_x], near)
    return np.sqrt(found).reshape(len(x), -1)


def fit(form: str, levels: list[np.ndarray], shapes: Any, epsilon: float) -> Any:
    images = levels[0].shape[-1]
    empty: Any = gaussian.init(shapes) if form == "moments" else low_rank.init(shapes, images)
    update = jax.jit(gaussian.update if form == "moments" else low_rank.update)
    return patchwise.finalize(update(empty, tuple(levels), np.ones(images, bool)), epsilon)


# Every kind of pyramid; where levels share cells, each form with each radius.
@pytest.mark.parametrize(
    ("name", "radius", "form"),
    [
        ("one channel", 2, "samples"),
        ("a level of one channel", 2, "moments"),
        ("three levels", 1, "samples"),
        ("three levels", 2, "moments"),
        ("no nested grids", 1, "moments"),
        ("no nested grids", 2, "samples"),
    ],
)
def test_smallest_distance_of_nearby_patches(name: str, radius: int, form: str):
    case, grid = patchwise.CASES[name], grid_of(name)
    pyramid = patchwise.lay(case)
    levels, x = patchwise.random_levels(case, 9)
    fitted = fit(form, [level[..., :6] for level in levels], pyramid.shapes, 0.5)
    shifts = embedding.shifts(pyramid, grid, radius)
    given = tuple(map(jnp.asarray, levels))
    found = jax.jit(scoring.mahalanobis_nearby)(fitted, given, shifts)
    found = scoring.on_grid(found, pyramid.patches)
    expected = nearest_distance(x[:6], x, grid, radius, 0.5)
    # Roundoffs as of `mahalanobis`, at a condition of up to 100; measured 2e-6.
    np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize(
    ("name", "form", "images", "size"),
    [
        ("one level", "samples", 4, 1),
        ("three levels", "moments", 11, 4),
        ("no nested grids", "moments", 4, 1),
        ("no nested grids", "samples", 11, 4),
    ],
)
def test_left_out_nearby_is_what_a_refit_gives(name: str, form: str, images: int, size: int):
    case, grid, epsilon = patchwise.CASES[name], grid_of(name), 0.5
    pyramid = patchwise.lay(case)
    levels, x = patchwise.random_levels(case, images)
    fitted = fit(form, levels, pyramid.shapes, epsilon * (images - size - 1) / (images - 1))
    shifts = embedding.shifts(pyramid, grid, 1)
    leave_out = jax.jit(scoring.leave_out_nearby, static_argnums=4)
    found = leave_out(fitted, tuple(map(jnp.asarray, levels)), shifts, images, size)
    found = np.asarray(scoring.on_grid(found, pyramid.patches))
    whole = images - images % size
    for start in range(0, whole, size):
        group = slice(start, start + size)
        expected = nearest_distance(np.delete(x, group, 0), x[group], grid, 1, epsilon)
        # What is subtracted leaves a few hundredths of 1 with few images; measured 3e-5.
        np.testing.assert_allclose(found[group], expected, rtol=3e-4)
    assert not np.any(found[whole:])


@pytest.mark.parametrize("radius", [0, 1], ids=["alone", "shift"])
@pytest.mark.parametrize(
    ("name", "form"),
    [("three levels", "moments"), ("three levels", "samples"), ("no nested grids", "moments")],
)
def test_region_of_interest_changes_no_distance_inside(name: str, form: str, radius: int):
    case, grid = patchwise.CASES[name], grid_of(name)
    inside = np.zeros(grid, bool)
    inside[1:4, 2:5] = inside[-1, -1] = True
    inside[2, 3] = False
    whole = patchwise.lay(case)
    part = embedding.restrict(whole, inside)
    features = patchwise.random_features(case[0], 9)
    levels, every = (
        [np.asarray(x) for x in embedding.select(list(map(jnp.asarray, features)), pyramid)]
        for pyramid in (part, whole)
    )
    assert len(levels[0]) < len(every[0])
    x = np.asarray(embedding.concatenate(tuple(map(jnp.asarray, every)), whole))
    fitted = fit(form, [level[..., :6] for level in levels], part.shapes, 0.5)
    given = tuple(map(jnp.asarray, levels))
    if radius:
        shifts = embedding.shifts(part, grid, radius)
        found = jax.jit(scoring.mahalanobis_nearby)(fitted, given, shifts)
    else:
        found = jax.jit(scoring.mahalanobis)(fitted, given)
    found = np.asarray(scoring.on_grid(found, part.patches)).reshape(9, *grid)
    expected = nearest_distance(x[:6].astype(float), x, grid, radius, 0.5, inside)
    expected = expected.reshape(found.shape)
    np.testing.assert_allclose(found[:, inside], expected[:, inside], rtol=3e-5)
    # Outside, the distance of the nearest patch inside.
    for y, column in np.argwhere(~inside):
        squares = np.sum((np.argwhere(inside) - (y, column)) ** 2, axis=1)
        nearest = np.argwhere(inside)[squares == squares.min()]
        values = [found[0, i, j] for i, j in nearest]
        assert found[0, y, column] in values


def test_neighbours_of_patches_that_share_cells():
    pyramid = patchwise.lay(patchwise.CASES["finest stage unused"])
    with pytest.raises(ValueError, match="no channel of the first layer is kept"):
        embedding.shifts(pyramid, (8, 8), 1)


def test_left_out_of_images_that_nothing_else_is_like():
    # Two images that are the same: without the third one nothing is like that one, and with
    # an epsilon that float32 does not tell from nothing, rounding may leave nothing of it.
    x = [np.array([0.0, 0.0, 3e4], np.float32).reshape(1, 1, 1, 3)]
    found = left_out("moments", x, [(1, 1, 1)], 1e-4, 1)[0, 0]
    assert np.all(np.isfinite(found))
    # The others are explained by nothing but each other: exactly 1.5e4 of sqrt(4.5e8 + 1e-4).
    np.testing.assert_allclose(found[:2], np.sqrt(0.5), rtol=1e-6)
    assert found[2] > 1e3


@sizes
def test_bilinear_equals_numpy(grid, size):
    on_grid = random_distances(grid)
    # np.interp holds the end values beyond the ends.
    ys, xs = ((np.arange(n) + 0.5) * m / n - 0.5 for m, n in zip(grid, size, strict=True))
    rows = np.apply_along_axis(lambda x: np.interp(ys, np.arange(grid[0]), x), 1, on_grid)
    expected = np.apply_along_axis(lambda x: np.interp(xs, np.arange(grid[1]), x), 2, rows)
    np.testing.assert_allclose(maps_of(on_grid, size), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("upsample", "kernel"), [("bilinear", hat), ("bicubic", keys)])
@sizes
def test_upsampling_equals_convolution_with_the_kernel(grid, size, upsample, kernel):
    on_grid = random_distances(grid)
    columns = resampled(on_grid.astype(np.float64), size[1], kernel)
    expected = resampled(columns.swapaxes(1, 2), size[0], kernel).swapaxes(1, 2)
    found = maps_of(on_grid, size, upsample)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
@sizes
def test_upsampling_equals_torch(grid, size, upsample):
    torch = pytest.importorskip("torch")
    on_grid = random_distances(grid)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(on_grid)[:, None], size=size, mode=upsample, align_corners=False
    )[:, 0]
    found = maps_of(on_grid, size, upsample)
    # torch computes the positions in float32 too: off by 16 * 2^-24, over slopes below 20.
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2 * ROUNDING)


@pytest.mark.parametrize("sigma", [0.05, 1.4, 4.0])
@pytest.mark.parametrize("size", [(40, 64), (33, 17), (7, 20), (1, 5)], ids=str)
def test_blur_equals_scipy(size, sigma):
    image = random_distances(size)
    expected = [
        ndimage.gaussian_filter(x.astype(np.float64), sigma, truncate=4.0, mode="mirror")
        for x in image
    ]
    found = maps_of(image, size, sigma=sigma)
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=ROUNDING)


def test_blur_comes_after_upsampling():
    # Blurring first would be a blur four times as wide.
    on_grid = random_distances((12, 10))
    upsampled = maps_of(on_grid, (48, 40)).astype(np.float64)
    expected = [ndimage.gaussian_filter(x, 4, truncate=4.0, mode="mirror") for x in upsampled]
    found = maps_of(on_grid, (48, 40), sigma=4.0)
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=ROUNDING)


def test_sigma_4_has_33_taps():
    impulse = np.zeros((1, 65, 65))
    impulse[0, 32, 32] = 1
    blurred = maps_of(impulse, (65, 65), sigma=4.0)[0]
    taps = np.exp(-(np.arange(-16, 17) ** 2) / 32)
    taps /= taps.sum()
    inside = slice(32 - 16, 32 + 17)
    np.testing.assert_allclose(blurred[inside, inside], np.outer(taps, taps), rtol=1e-6)
    assert np.count_nonzero(blurred) == 33 * 33


def test_sigma_0_does_not_blur():
    on_grid = random_distances((36, 64))
    np.testing.assert_array_equal(maps_of(on_grid, (36, 64), sigma=0.0), on_grid)


@pytest.mark.parametrize("upsample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("name", "sigma"), [("4x", 0.0), ("two by one", 4.0), ("2x and 5x", 40.0)]
)
def test_constant_maps_stay_constant(name, upsample, sigma):
    grid, size = SIZES[name]
    # Also where the blur's kernel is many times as wide as the image.
    found = maps_of(np.full((1, *grid), 7.0), size, upsample, sigma)
    np.testing.assert_allclose(found, np.full((1, *size), 7.0), rtol=0, atol=ROUNDING)


def test_patches_fill_the_grid_row_by_row():
    found = maps_of(np.arange(12.0).reshape(1, 3, 4), (3, 4))
    np.testing.assert_array_equal(found[0], np.arange(12.0).reshape(3, 4))


def test_maps_of_a_batch_are_those_of_its_images():
    on_grid = random_distances((6, 9), batch=3)
    together = maps_of(on_grid, (24, 36), sigma=4.0)
    for image, found in zip(on_grid, together, strict=True):
        alone = maps_of(image[None], (24, 36), sigma=4.0)[0]
        np.testing.assert_allclose(found, alone, rtol=0, atol=ROUNDING)


def test_distances_of_another_grid_raise():
    # Four images of 4 patches are not one image of 4 x 4 patches.
    with pytest.raises(TypeError, match="reshape"):
        anomaly_maps(jnp.zeros((4, 4)), (4, 4), (8, 8), "bilinear", 0.0)


def test_unknown_upsampling_raises():
    with pytest.raises(ValueError, match="'area': expected 'nearest', 'bilinear'"):
        maps_of(np.zeros((1, 2, 2)), (4, 4), upsample="area")
