"""One step of training, as a pure function that is mapped over devices.

The task is PaDiM itself, on scenes drawn for it (`inspection`), with channels drawn
anew in each step, since PaDiM keeps only some. In addition channels should not be redundant
(`redundancy`), and a linear layer should predict each cell's own pixels: this keeps
information in the features that no drawn defect was about.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt8

from padim_jax.config.backbones import STRIDES
from padim_jax.devices import parallel
from padim_jax.pretrain import inspection, network, scenes, textures
from padim_jax.pretrain.config import TEXTURE_SIZE, PretrainConfig
from padim_jax.pretrain.network import STAGES
from padim_jax.pretrain.redundancy import redundancy
from padim_jax.pretrain.scenes import Bank, Photos, Scene

Tree = Any

# ImageNet's, as in PaDiM's default configuration.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Purposes of random numbers: each draws from its own key.
_WEIGHTS, _TEXTURES, _IMAGES, _CHANNELS = range(4)


class State(NamedTuple):
    """Complete state of a training.

    Attributes:
      step: number of steps done.
      params: parameters of `network.Network`.
      batch_stats: running statistics of its norms.
      optimizer: state of `optimizer`.
      average: exponential moving averages of params and batch_stats, which are the result.
    """

    step: Int32[Array, ""]
    params: Tree
    batch_stats: Tree
    optimizer: Tree
    average: Tree


class Measures(NamedTuple):
    """Measurements of a step.

    Attributes:
      ranking: see `inspection.ranking`.
      auroc: see `inspection.ranking`.
      redundancy: see `redundancy`.
      pixels: squared error, in units of the images' variance.
      rate: learning rate.
    """

    ranking: Float32[Array, ""]
    auroc: Float32[Array, ""]
    redundancy: Float32[Array, ""]
    pixels: Float32[Array, ""]
    rate: Float32[Array, ""]


def _key(config: PretrainConfig, purpose: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def bank(
    config: PretrainConfig, drawn: Callable[[int], object] = lambda _: None
) -> UInt8[np.ndarray, "classes instances t t"]:
    """Draw the recipe's textures; see `textures.bank`.

    Args:
      config: the recipe.
      drawn: see `textures.bank`.

    Returns:
      (classes, instances, t, t) uint8.
    """
    images = config.images
    key, side = _key(config, _TEXTURES), TEXTURE_SIZE
    return textures.bank(key, images.classes, images.instances, side, drawn)


def schedule(config: PretrainConfig) -> optax.Schedule:
    """Return the learning rate: a linear rise, then half a cosine down to 0."""
    own = config.optimizer
    return optax.warmup_cosine_decay_schedule(0.0, own.learning_rate, own.warmup, own.steps)


def optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Return AdamW; only kernels decay, as norms and biases may have any scale."""

    def kernels(params: Tree) -> Tree:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    decay = config.optimizer.weight_decay
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule(config), weight_decay=decay, mask=kernels),
    )


def initial(
    config: PretrainConfig, examples: Float[Array, "b s s 3"], weights: Tree | None = None
) -> State:
    """Return the state before the first step.

    Args:
      config: the recipe.
      examples: some of its images.
      weights: params of a backbone with folded norms to start from; None for random ones.

    Returns:
      The state.
    """
    model = network.Network(config.backbone, config.precision)
    variables = model.init(_key(config, _WEIGHTS), normalised(examples[:1]))
    if weights is not None:
        variables = network.with_weights(
            variables, weights, normalised(examples), config.backbone
        )
    params, stats = variables["params"], variables["batch_stats"]
    return State(
        step=jnp.int32(0),
        params=params,
        batch_stats=stats,
        optimizer=optimizer(config).init(params),
        average={"params": params, "batch_stats": stats},
    )


def draw(
    config: PretrainConfig,
    step: Int32[Array, ""],
    numbers: Int[Array, " n"],
    bank: Bank,
    photos: Photos | None,
) -> Scene:
    """Draw some images of a step, independent of which others are drawn with them.

    Args:
      config: the recipe.
      step: number of the step, from 0.
      numbers: numbers of the images within the step; each scene has `good + inspected` in a
        row, the good ones first.
      bank: textures.
      photos: photographs, or None for none.

    Returns:
      Images (n, s, s, 3) and defects (n, s, s).
    """
    task, images = config.task, config.images
    each = task.good + task.inspected
    key = jax.random.fold_in(_key(config, _IMAGES), step)

    def one(number: Int[Array, ""]) -> Scene:
        own = jax.random.fold_in(key, number // each)
        of_photos, what = jax.random.split(own)
        view = jax.random.fold_in(what, number % each)
        good = number % each < task.good
        drawn = scenes.scene(what, view, good, bank, images.size)
        if photos is None:
            return drawn
        taken = scenes.photograph(what, view, good, photos, bank, images.size)
        choice = jax.random.bernoulli(of_photos, images.photo_part)
        return jax.tree.map(lambda a, b: jnp.where(choice, a, b), taken, drawn)

    return jax.vmap(one)(numbers)


def normalised(images: Float[Array, "b s s 3"]) -> Float32[Array, "b s s 3"]:
    """Normalise images as the network expects them."""
    return (images - jnp.array(MEAN, ndmin=4)) / jnp.array(STD, ndmin=4)


def train_step(
    config: PretrainConfig, state: State, bank: Bank, photos: Photos | None
) -> tuple[State, Measures]:
    """Compute a device's part of a step, inside `parallel.mapped`.

    Each device draws its own scenes; gradients and batch statistics are means over all devices,
    so that the number of devices changes results by rounding only.

    Args:
      config: the recipe; the number of devices divides that of its scenes.
      state: state, equal on all devices.
      bank: textures.
      photos: photographs, or None for none.

    Returns:
      The state after the step, and measurements before it.
    """
    numbers = parallel.share_of(config.batch_size)
    scene = draw(config, state.step, numbers, bank, photos)
    images = normalised(scene.image)
    model = network.Network(config.backbone, config.precision)
    kept = _channels(config, state.step)

    def objective(params: Tree) -> tuple[Float32[Array, ""], tuple[Tree, Array, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        (features, told), changed = model.apply(variables, images, mutable=["batch_stats"])
        ranking, auroc = _inspected(config, features, kept, scene.defect)
        ranking, pixels = jnp.mean(ranking), _pixel_error(told, images)
        repeated = redundancy(features, parallel.mean)
        loss = ranking + config.task.redundancy * repeated + config.task.pixels * pixels
        return loss, (changed["batch_stats"], auroc, (ranking, repeated, pixels))

    slope, (stats, auroc, found) = jax.grad(objective, has_aux=True)(state.params)
    slope, (ranking, repeated, pixels) = parallel.mean((slope, found))
    known = parallel.total(jnp.sum(~jnp.isnan(auroc)))
    auroc = parallel.total(jnp.nansum(auroc)) / known
    update, optimizer_state = optimizer(config).update(slope, state.optimizer, state.params)
    params = optax.apply_updates(state.params, update)
    # Early on, an average over the steps so far, which forgets the first ones soon.
    decay = jnp.minimum(config.optimizer.average, (1.0 + state.step) / (10.0 + state.step))
    average = optax.incremental_update(
        {"params": params, "batch_stats": stats}, state.average, 1 - decay
    )
    rate = jnp.asarray(schedule(config)(state.step), jnp.float32)
    new = State(state.step + 1, params, stats, optimizer_state, average)
    return new, Measures(ranking, auroc, repeated, pixels, rate)


def _channels(
    config: PretrainConfig, step: Int32[Array, ""]
) -> tuple[Float32[Array, " _c"], ...]:
    """Return 1 for the channels of each stage that this step keeps, 0 for others."""
    counts = network.channels(config.backbone)
    key = jax.random.fold_in(_key(config, _CHANNELS), step)
    order = jax.random.permutation(key, sum(counts))
    kept = (order < config.task.channels).astype(jnp.float32)
    return tuple(jnp.split(kept, np.cumsum(counts)[:-1]))


def _inspected(
    config: PretrainConfig,
    features: tuple[Float32[Array, "b _h _w _c"], ...],
    kept: tuple[Float32[Array, " _c"], ...],
    defect: Float[Array, "b s s"],
) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
    good, each = config.task.good, config.task.good + config.task.inspected

    def by_scene(x: Array) -> Array:
        return x.reshape(-1, each, *x.shape[1:])

    features = tuple(map(by_scene, inspection.standardised(features, parallel.mean)))
    distances = inspection.log_distances(features, kept, good)
    spoilt = by_scene(_averaged(defect[..., None], STRIDES[STAGES[0]])[..., 0])
    return inspection.ranking(distances, spoilt[:, good:])


def _averaged(x: Float[Array, "b h w c"], width: int) -> Float[Array, "b i j c"]:
    """Return the mean of each square of pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // width, width, w // width, width, c).mean((2, 4))


def _pixel_error(
    told: tuple[Float32[Array, "b _h _w p"], ...], images: Float32[Array, "b s s 3"]
) -> Float32[Array, ""]:
    """Return the error of each cell's predicted 4x4 pixels, averages for deeper stages."""
    errors = []
    side = network.PATCH
    for stage, guess in zip(STAGES, told, strict=True):
        x = _averaged(images, STRIDES[stage] // side)
        b, h, w, c = x.shape
        x = x.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
        errors.append(jnp.mean((guess - x.reshape(guess.shape)) ** 2))
    return sum(errors, jnp.float32(0)) / len(errors)
