"""A complete pretraining: recipe -> weights, curves and a description; files are written here.

In the working folder: `backbone.safetensors`, the weights, batch norm folded, float16, by
torchvision's names, for `config.model.weights`; `recipe.json`, the recipe;
`curves.png` and `history.json`; `images.png`, some of the images; and `checkpoint`, from
which an interrupted training resumes.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Float32
from PIL import Image

import padim_jax
from padim_jax.config.backbones import RANDOM_WEIGHTS
from padim_jax.data import input_pipeline
from padim_jax.data.files import image_files, read_file, shown
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import Stopped, UserError
from padim_jax.models import network as networks
from padim_jax.models.weights import folding, pretrained
from padim_jax.output import figures
from padim_jax.pretrain import config as config_lib
from padim_jax.pretrain import network, saving, training
from padim_jax.pretrain.config import PretrainConfig
from padim_jax.pretrain.scenes import Bank, Photos
from padim_jax.pretrain.training import Measures, State, Tree
from padim_jax.system import interrupts, locks, paths, progress
from padim_jax.system.paths import Path

WEIGHTS = "backbone.safetensors"
RECIPE = "recipe.json"
HISTORY = "history.json"
CURVES = "curves.png"
IMAGES = "images.png"
CHECKPOINT = "checkpoint"
# Minimum number of points of the curves, and maximum number of steps between two of them.
_POINTS, _EVERY = 20, 50
# Like `inspection.DEVIATION`, for the result's features. Lower than in training: directions in
# which features of normal images hardly differ then count less beside epsilon, the least
# variance of the Gaussians. Measured, see docs/pretraining.md.
DEVIATION = 1.0
# Minimum number of images that the features' deviation is measured on, and number of scenes
# that are shown.
_MEASURED = 256
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Inputs of a training besides its recipe.

    Attributes:
      weights: weights to start from; None for random ones.
      photos: the user's own images; None for none.
      identity: identity of both, for JSON.
    """

    weights: Tree | None
    photos: Photos | None
    identity: dict[str, Any]


def pretrain(config: PretrainConfig, workdir: pathlib.Path) -> None:
    """Train a backbone, or resume an interrupted training of the same recipe.

    Args:
      config: the recipe.
      workdir: see above; on a file system.

    Raises:
      UserError: something in the recipe is unavailable or impossible.
      Stopped: stopped by SIGTERM; progress is saved.
    """
    devices = parallel.every()
    if config.optimizer.scenes % devices.total:
        raise UserError(
            f"config.optimizer.scenes={config.optimizer.scenes}: cannot be shared out to "
            f"{devices.total} devices; expected a multiple of {devices.total}"
        )
    with locks.held(workdir / CHECKPOINT, devices.process):
        recipe = config_lib.to_dict(config)
        del recipe["checkpoint_every"]  # does not change results
        inputs = _inputs(config)
        made_by = {"recipe": recipe, "inputs": inputs.identity}
        if _finished(workdir, made_by):
            print(f"{workdir / WEIGHTS}: finished already, by this recipe")
            return
        _pretrain(config, inputs, made_by, workdir, devices)


def _pretrain(
    config: PretrainConfig,
    inputs: _Inputs,
    made_by: dict[str, Any],
    workdir: pathlib.Path,
    devices: Devices,
) -> None:
    photos = inputs.photos
    with progress.bar(
        config.images.classes, "textures", devices.process == 0, unit="class"
    ) as bar:
        bank = training.bank(config, bar.update)
    examples = _images(config, bank, photos)
    state = training.initial(config, examples, inputs.weights)
    done, history = 0, []
    if found := saving.load(workdir / CHECKPOINT, state, made_by, devices):
        done, state, history = found
        print(f"going on with an interrupted training, after {done} steps")
    state = _train(config, made_by, workdir, state, bank, photos, done, history, devices)
    tensors = _exported(config, state, examples)
    if devices.process == 0:
        said = {**made_by, "devices": devices.total}  # it changes the rounding
        _write(config, said, workdir, tensors, history, examples)


def _train(
    config: PretrainConfig,
    made_by: dict[str, Any],
    workdir: pathlib.Path,
    state: State,
    bank: Bank,
    photos: Photos | None,
    done: int,
    history: saving.History,
    devices: Devices,
) -> State:
    """Train all remaining steps, extending the history."""
    step = parallel.mapped(training.train_step, static=(0,), replicated=(2, 3), donated=(1,))
    bank, photos = parallel.replicate((bank, photos), devices)
    total = config.optimizer.steps
    every = max(1, min(_EVERY, total // _POINTS))
    state = parallel.copies(state, devices)
    kept = done

    def save() -> None:
        nonlocal kept
        # An existing save is not replaced by another copy of it.
        if kept < done:
            host = jax.tree.map(lambda x: np.asarray(x[0]), state)
            saving.save(workdir / CHECKPOINT, done, host, made_by, history, devices)
            kept = done

    measures: list[Measures] = []
    saved = time.monotonic()
    with (
        interrupts.sigterm() as asked,
        progress.bar(total, "pretrain", devices.process == 0, done, "step") as bar,
    ):
        while done < total:
            state, found = step(config, state, bank, photos)
            measures.append(found)
            done += 1
            # Joined processes must check at the same steps.
            stopping = asked() and devices.processes == 1
            if done % every and done < total and not stopping:
                # At most one step ahead of the devices.
                jax.block_until_ready(measures[-2:][0])
                bar.update()
                continue
            means = _means(measures)
            measures = []
            if not np.all(np.isfinite(means)):
                raise UserError(
                    f"pretraining: after {done} steps the loss is no number; lower "
                    f"config.optimizer.learning_rate={config.optimizer.learning_rate:g}"
                )
            history.append([done, *means])
            bar.set_postfix({"AUROC": f"{means[1]:.3f}"}, refresh=False)
            bar.update()
            late = time.monotonic() - saved > config.checkpoint_every
            stop, due = parallel.gather(np.array([[asked(), late]])).reshape(-1, 2).any(0)
            if stop or due:
                save()
                saved = time.monotonic()
                if devices.process == 0:
                    progress.say(
                        f"{done} of {total} steps, saved: ranking loss {means[0]:.3f}, "
                        f"AUROC of patches {means[1]:.3f}"
                    )
            if stop and done < total:
                raise Stopped(
                    f"stopped by SIGTERM after {done} of {total} steps, saved in "
                    f"{workdir / CHECKPOINT}; the same command goes on"
                )
    save()
    return jax.tree.map(lambda x: np.asarray(x[0]), state)


def _means(measures: list[Measures]) -> list[float]:
    values = [[float(np.asarray(x)[0]) for x in each] for each in measures]
    # A step may by chance have no scene with an obvious defect, and so no AUROC.
    auroc = [row[1] for row in values if np.isfinite(row[1])]
    means = np.mean(values, 0).tolist()
    means[1] = float(np.mean(auroc)) if auroc else 0.5
    means[-1] = values[-1][-1]
    return means


def _inputs(config: PretrainConfig) -> _Inputs:
    """Read the inputs; their paths may hold something else later."""
    weights, identity = None, None
    if config.start != RANDOM_WEIGHTS:
        variables, found = pretrained.load(config.start, config.backbone, network.STAGES)
        weights, identity = variables["params"], dataclasses.asdict(found)
    photos, content = None, None
    if config.images.photos is not None:
        photos, content = _photos(config.images.photos, config.images.photo_size)
    return _Inputs(weights, photos, {"start": identity, "photos": content})


def _photos(folder: Path, size: int) -> tuple[Photos, dict[str, Any]]:
    """Return a folder's images, all of one size, and their files' identity for JSON."""
    resize = {"size": (size, size), "resample": Image.Resampling.BILINEAR}
    pixels, digest = [], hashlib.sha256()
    for file in image_files(folder):
        content = read_file(file)
        digest.update(hashlib.sha256(content).digest())
        pixels.append(np.asarray(input_pipeline.decode(content, shown(file)).resize(**resize)))
    return np.stack(pixels), {"images": len(pixels), "sha256": digest.hexdigest()}


def _images(
    config: PretrainConfig, bank: Bank, photos: Photos | None
) -> Float[Array, "b s s 3"]:
    """Return example images of a training, which belong to no step."""
    each = config.task.good + config.task.inspected
    scenes = -(-_MEASURED // each)

    @jax.jit
    def draw(bank: Bank, photos: Photos | None) -> Float[Array, "b s s 3"]:
        numbers = jnp.arange(scenes * each)
        return training.draw(config, jnp.int32(-1), numbers, bank, photos).image

    return draw(bank, photos)


def _exported(
    config: PretrainConfig, state: State, images: Float[Array, "b s s 3"]
) -> dict[str, np.ndarray]:
    """Return the averaged weights, norms folded, features scaled to `DEVIATION`."""
    tensors = network.folded(state.average)
    variables = folding.convert(tensors, config.backbone, network.STAGES, "pretraining")
    model = networks.build(config.backbone, network.STAGES, "float32")
    features = jax.jit(model.apply)(variables, training.normalised(images))
    factors = {
        stage: np.full(
            x.shape[-1], DEVIATION / np.sqrt(np.var(x, (0, 1, 2)).mean()), np.float32
        )
        for stage, x in zip(network.STAGES, map(np.asarray, features), strict=True)
    }
    return network.rescaled(tensors, factors)


def _write(
    config: PretrainConfig,
    said: dict[str, Any],
    workdir: pathlib.Path,
    tensors: dict[str, Float32[np.ndarray, "..."]],
    history: saving.History,
    images: Float[Array, "b s s 3"],
) -> None:
    # safetensors writes arrays in memory order, not in the order of their axes.
    half = {name: np.ascontiguousarray(x, np.float16) for name, x in tensors.items()}
    if not all(np.isfinite(x).all() for x in half.values()):
        raise UserError("pretraining: the weights are too large for float16; lower the rate")
    _draw_curves(workdir / CURVES, history)
    names = ("step", *Measures._fields)
    rows = [dict(zip(names, row, strict=True)) for row in history]
    paths.write(workdir / HISTORY, (json.dumps(rows, indent=1) + "\n").encode())
    each = config.task.good + config.task.inspected
    pixels = np.asarray(jnp.round(images[: _SHOWN * each] * 255)).astype(np.uint8)
    shown_images = [Image.fromarray(x) for x in pixels]
    figures.save(figures.contact_sheet(shown_images, each), workdir / IMAGES)
    content = safetensors.numpy.save(half)
    paths.write(workdir / WEIGHTS, content)
    said = said | {
        "version of padim_jax": padim_jax.__version__,
        "version of jax": jax.__version__,
        "images": config.batch_size * config.optimizer.steps,
        "last": rows[-1] if rows else {},
    }
    paths.write(workdir / RECIPE, (json.dumps(said, indent=2) + "\n").encode())
    print(
        f"{workdir / WEIGHTS}: {len(content) / 1e6:.1f} MB; use it with "
        f"--config.model.weights={workdir / WEIGHTS}"
    )


def _finished(workdir: pathlib.Path, made_by: dict[str, Any]) -> bool:
    """Return whether there are weights by this recipe and from these inputs.

    Raises:
      UserError: there are others.
    """
    if not (workdir / RECIPE).exists():
        return False
    try:
        said = json.loads((workdir / RECIPE).read_text(encoding="utf-8"))
        same = all(said[name] == value for name, value in made_by.items())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / RECIPE}: no recipe ({error}); move it away") from error
    if not same:
        raise UserError(
            f"{workdir}: holds weights by another recipe or of other images or first weights "
            f"({RECIPE} says which); name another --workdir"
        )
    return (workdir / WEIGHTS).exists()


def _draw_curves(path: Path, history: saving.History) -> None:
    figure = figures.diagram(9.0, 5.0)
    columns = np.array(history, float).reshape(-1, 1 + len(Measures._fields)).T
    names = (
        *("ranking loss", "AUROC of patches", "redundancy of channels"),
        *("pixel error", "learning rate"),
    )
    for i, (name, values) in enumerate(zip(names, columns[1:], strict=True)):
        axes = figure.add_subplot(2, 3, i + 1)
        axes.plot(columns[0], values, linewidth=1)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    figures.save_diagram(figure, path)
