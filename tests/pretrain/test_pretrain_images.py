"""What a pretraining draws: textures of many kinds, scenes seen often, and defects in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from padim_jax.pretrain import config as config_lib
from padim_jax.pretrain import scenes, textures
from padim_jax.pretrain.scenes import Scene

TEXTURE, SIZE = 64, 32  # pixels a side
KEYS, VIEWS = 16, 6
COUNT = KEYS * VIEWS


CLASSES, INSTANCES = 2 * config_lib.FAMILIES, 2


@pytest.fixture(scope="module")
def bank() -> np.ndarray:
    """What `textures.bank` draws of two classes of every family, compiled as one program."""
    numbers = np.repeat(np.arange(CLASSES), INSTANCES)
    kinds = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(numbers)
    looks = jax.vmap(lambda kind: jax.random.split(kind, INSTANCES))(kinds[::INSTANCES])

    def draw(one: tuple[Any, Any, Any]) -> jax.Array:
        def family(*arguments: Any) -> jax.Array:
            return lax.switch(one[0], textures.FAMILIES, *arguments)

        return textures.texture(family, *one[1:], TEXTURE)

    given = numbers % config_lib.FAMILIES, kinds, looks.reshape(-1)
    drawn = np.asarray(jax.jit(lambda *all_: lax.map(draw, all_))(*given))
    return drawn.reshape(CLASSES, INSTANCES, TEXTURE, TEXTURE)


class TestTextures:
    def test_a_recipe_has_a_class_of_every_family(self):
        assert len(textures.FAMILIES) == config_lib.FAMILIES

    def test_all_have_contrast_about_the_same_grey(self, bank: np.ndarray):
        # What is not finite would have become one grey.
        assert bank.dtype == np.uint8
        # 127 and 51 but for what saturates; measured 125 to 130 and 42 to 51.
        np.testing.assert_allclose(bank.mean((2, 3)), 127, atol=8)
        np.testing.assert_array_less(35, bank.std((2, 3)))
        np.testing.assert_array_less(bank.std((2, 3)), 55)

    def test_no_two_are_alike(self, bank: np.ndarray):
        """Neither classes nor instances of one, in mean absolute difference."""
        flat = bank.reshape(CLASSES * INSTANCES, -1).astype(np.float32)
        difference = np.abs(flat[:, None] - flat[None]).mean(-1)
        np.fill_diagonal(difference, np.inf)
        # Of independent ones of deviation 51 it is some 58; measured at least 34.
        assert difference.min() > 20

    def test_no_place_is_special(self, bank: np.ndarray):
        """Every part of the picture has contrast: nothing fades out towards an edge."""
        parts = bank.reshape(-1, 2, TEXTURE // 2, 2, TEXTURE // 2).astype(np.float32)
        deviation = parts.std((2, 4)).mean(0)
        assert deviation.max() / deviation.min() < 1.3

    def test_a_class_does_not_depend_on_how_many_there_are(self, bank: np.ndarray):
        told = []
        few = textures.bank(jax.random.key(0), 1, INSTANCES, TEXTURE, told.append)
        assert told == [1]
        # Compiled otherwise, a brightness may be rounded otherwise.
        assert np.abs(few.astype(int) - bank[:1]).max() <= 1


def every_view() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and views of `COUNT` images without defects, and of the same with."""
    keys = jnp.repeat(jax.random.split(jax.random.key(1), KEYS), VIEWS)
    views = jax.random.split(jax.random.key(2), COUNT)
    good = jnp.arange(2 * COUNT) < COUNT
    return jnp.concatenate([keys, keys]), jnp.concatenate([views, views]), good


class Drawn(NamedTuple):
    """On the host: (n, s, s, 3) and (n, s, s)."""

    image: np.ndarray
    defect: np.ndarray


def halves(found: Scene) -> tuple[Drawn, Drawn]:
    """Images without defects, and with."""
    image, defect = map(np.asarray, found)
    return Drawn(image[:COUNT], defect[:COUNT]), Drawn(image[COUNT:], defect[COUNT:])


def spread(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask, and all within so many pixels; slopes are taken around the image's edges."""
    shifts = [(i, j) for i in range(-by, by + 1) for j in range(-by, by + 1)]
    return np.any([np.roll(mask, shift, (1, 2)) for shift in shifts], 0)


@pytest.fixture(scope="module")
def drawn(bank: np.ndarray) -> tuple[Drawn, Drawn]:
    def draw(key: jax.Array, view: jax.Array, good: jax.Array) -> Scene:
        return scenes.scene(key, view, good, bank, SIZE)

    return halves(jax.jit(jax.vmap(draw))(*every_view()))


PHOTOS = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def taken(bank: np.ndarray) -> tuple[Drawn, Drawn]:
    def take(key: jax.Array, view: jax.Array, good: jax.Array) -> Scene:
        return scenes.photograph(key, view, good, PHOTOS, bank, SIZE)

    return halves(jax.jit(jax.vmap(take))(*every_view()))


class TestScenes:
    def test_good_ones_have_no_defect(self, drawn: tuple[Drawn, Drawn]):
        good, spoilt = drawn
        assert not np.any(good.defect)
        for images in (good.image, spoilt.image):
            assert images.shape == (COUNT, SIZE, SIZE, 3)
            assert np.isfinite(images).all()
            assert images.min() >= 0
            assert images.max() <= 1
            # Nothing is black, white or grey all over.
            assert images.std((1, 2)).max(-1).min() > 0.01

    def test_defects_are_small_and_not_always_there(self, drawn: tuple[Drawn, Drawn]):
        _, spoilt = drawn
        assert spoilt.defect.min() >= 0
        assert spoilt.defect.max() <= 1
        # None, one or two are equally likely; a small one may lie beside the image.
        assert 0.5 < np.mean(spoilt.defect.max((1, 2)) > 0) < 0.85
        # Measured: at most a fifth of an image.
        assert (spoilt.defect > 0).mean((1, 2)).max() < 0.4

    def test_only_the_defect_is_different(self, drawn: tuple[Drawn, Drawn]):
        """Light, pose, noise are the view's, whether something is wrong or not."""
        good, spoilt = drawn
        changed = np.abs(good.image - spoilt.image).max(-1) > 0
        there = spoilt.defect > 0
        # Its relief ends one unit of the outline's own measure farther out than its cover, at
        # most 1.9 pixels where that is stretched, a bit more where noise bends it; slopes take
        # one pixel more, the camera's unsharpness another.
        assert not np.any(changed & ~spread(there, 5))
        # And most of what is covered is another colour.
        assert np.mean(changed[there]) > 0.9
        nothing = ~there.any((1, 2))
        np.testing.assert_array_equal(good.image[nothing], spoilt.image[nothing])

    def test_defects_can_be_seen(self, drawn: tuple[Drawn, Drawn]):
        good, spoilt = drawn
        change = np.abs(good.image - spoilt.image).max(-1) * (spoilt.defect > 0.5)
        there = spoilt.defect.max((1, 2)) > 0.5
        # 8 steps of an 8-bit image at the place where it is strongest; a few are blurred
        # where nothing was sharp. Measured: 95 % are, half of all by 60 steps.
        assert np.mean(change.max((1, 2))[there] > 8 / 255) > 0.85

    def test_views_show_one_thing(self, drawn: tuple[Drawn, Drawn]):
        images = drawn[0].image.reshape(KEYS, VIEWS, -1)
        views = np.abs(images[:, :, None] - images[:, None]).mean(-1)
        others = np.abs(images[:, None, 0] - images[None, :, 1]).mean(-1)
        apart = ~np.eye(VIEWS, dtype=bool)
        # No two are the same.
        assert views[:, apart].min() > 0.005
        # Measured 0.1 to 0.3.
        within, between = views[:, apart].mean(), others[~np.eye(KEYS, dtype=bool)].mean()
        assert within < 0.5 * between

    def test_scenes_have_shapes_and_colours(self, drawn: tuple[Drawn, Drawn]):
        """Not all is grey, and neither is it all colourful."""
        images = drawn[0].image.reshape(KEYS, VIEWS, -1, 3)
        colour = np.ptp(images.mean(2), axis=-1).mean(1)
        assert colour.min() < 0.1 < colour.max()


class TestPhotographs:
    def test_good_ones_are_pieces_of_photographs(self, taken: tuple[Drawn, Drawn]):
        good = taken[0]
        assert not np.any(good.defect)
        windows = np.lib.stride_tricks.sliding_window_view(PHOTOS, (SIZE, SIZE), (1, 2))
        windows = np.moveaxis(windows, 3, -1)
        places, which = set(), set()
        for number, image in enumerate(good.image):
            # Divided by 255, which rounding undoes; of random pixels no other place fits.
            np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-4)
            pixels = np.round(image * 255).astype(np.uint8)
            (found,) = np.argwhere((windows == pixels).all((3, 4, 5)))
            which.add(int(found[0]))
            places.add((number // VIEWS, int(found[1]), int(found[2])))
        # The same place in all views of a key, in any photograph.
        assert len(places) == KEYS
        assert len({place[1:] for place in places}) > KEYS / 2
        assert which == set(range(len(PHOTOS)))

    def test_only_the_defect_is_different(self, taken: tuple[Drawn, Drawn]):
        good, spoilt = taken
        changed = np.abs(good.image - spoilt.image).max(-1) > 1e-6
        there = spoilt.defect > 0
        # As for scenes, without a camera.
        assert not np.any(changed & ~spread(there, 4))
        assert np.mean(changed[there]) > 0.9
        assert 0.5 < np.mean(there.any((1, 2))) < 0.85
