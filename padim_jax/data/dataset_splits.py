"""A configuration -> the images of its dataset, by split."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from padim_jax.config.settings import Config
from padim_jax.data import copies, files, masks, sampling
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts import LAYOUTS
from padim_jax.data.layouts import folder as folder_layout
from padim_jax.data.records import Record, Source, Split
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.system import paths

_MOST_NAMED = 5  # folders in a warning


def with_held_out(config: Config, splits: Mapping[str, Source]) -> dict[str, Source]:
    """Return the splits, with training images held out for validation if requested.

    Whole groups are held out at random; of exact copies only the first counts.

    Args:
      config: configuration of the run.
      splits: splits of the dataset.

    Returns:
      Splits with "train" divided into "train" and "validation", or unchanged.
    """
    threshold = config.threshold
    if threshold.normal != "held_out" or splits["validation"].records:
        return dict(splits)
    source = copies.distinct(splits["train"], parallel.every())
    groups = sampling.groups(source.records, threshold.groups)
    _, held = sampling.held_out(
        range(int(groups.max(initial=-1)) + 1), threshold.held_out, config.dataset.seed
    )
    is_held = np.isin(groups, held)
    parts = (source.part(np.flatnonzero(x)) for x in (~is_held, is_held))
    return {**splits, **dict(zip(("train", "validation"), parts, strict=True))}


def open_dataset(config: Config) -> dict[str, Source]:
    """Open the images of a configuration; no image is decoded.

    Returns:
      The splits "train" (limited to `train_images`), "validation" and "test"; the latter two
      may be empty.

    Raises:
      UserError: folders or files are missing.
    """
    sources: dict[str, Source] = _open_splits(config)
    if config.dataset.inverted_masks == "yes":
        for split, source in sources.items():
            sources[split] = masks.Inverted(source)
    if parallel.every().process == 0:
        _warn_unused(config)
    return held_back(config, sources)


def _warn_unused(config: Config) -> None:
    """Warn of folders in the dataset whose images are not read."""
    layout, dataset = LAYOUTS[config.dataset.name], config.dataset
    base = layout.folder(dataset.root, config.category)
    if not paths.is_folder(base):  # packed elsewhere
        return
    if unused := layout.unused(dataset.root, config.category):
        names = ", ".join(
            files.shown(path.relative_to(base).as_posix()) for path in unused[:_MOST_NAMED]
        )
        more = f" and {len(unused) - _MOST_NAMED} more" if unused[_MOST_NAMED:] else ""
        warnings.warn(
            DataWarning(
                f"{base}: images that are not used lie in {names}{more}; "
                f"config.dataset.name={dataset.name} has no such folder (docs/datasets.md). "
                "Rename the folder if they are to be used, else move it elsewhere"
            ),
            stacklevel=3,
        )


def held_back(config: Config, sources: dict[str, Source]) -> dict[str, Source]:
    """Apply exclusions and `train_images` to a dataset's splits; see `open_dataset`.

    Args:
      config: configuration of the run.
      sources: splits of the dataset.

    Returns:
      The splits, with "train" reduced.
    """
    train = sources["train"]
    if exclude := config.dataset.exclude:
        train = _without_excluded(train, exclude)
    if count := config.dataset.train_images:
        chosen = sampling.subset(range(len(train.records)), count, config.dataset.seed)
        train = sampling.part(train, chosen)
    return {**sources, "train": train}


def _without_excluded(source: Source, exclude: Sequence[str]) -> Source:
    """Return the training images without those in `config.dataset.exclude`."""
    known = {record.relative_path for record in source.records}
    if unknown := [name for name in exclude if name not in known]:
        example = f", as in {next(iter(known))!r}" if known else ""
        raise UserError(
            f"config.dataset.exclude: {unknown[0]!r} is none of the {len(known)} training "
            f"images; expected their relative paths{example}"
        )
    left = [i for i, x in enumerate(source.records) if x.relative_path not in set(exclude)]
    return sampling.part(source, left)


def say_folders(config: Config, sources: Mapping[str, Source]) -> None:
    """Print which folders count as good images, for a layout that goes by their names.

    Args:
      config: configuration of the run.
      sources: splits of the dataset.
    """
    if config.dataset.name == "folder":
        records = itertools.chain.from_iterable(source.records for source in sources.values())
        print(folder_layout.summary(records))


def _open_splits(config: Config) -> dict[str, Source]:
    # Only one process draws or packs what is missing.
    with parallel.first_process_first():
        dataset = config.dataset
        layout = LAYOUTS[dataset.name]
        if dataset.source == "folder":
            records = layout.records(dataset.root, config.category, dataset.seed)
            folder = layout.folder(dataset.root, config.category)
            images = [record.image for record in records]
            if text := files.passed_over(files.hidden_beside(images, folder)):
                print(text)
            return by_split(records)
        # Imported here: TensorFlow Datasets is slow to import and rarely needed.
        from padim_jax.data import packing

        packed = packing.packed_dir(dataset.tfds_dir, config.packed_name)
        folder = layout.folder(dataset.root, config.category)
        # A synthetic dataset is drawn if missing.
        if paths.is_folder(folder) or dataset.name == "synthetic":
            records = layout.records(dataset.root, config.category, dataset.seed)
        else:
            records = None
            print(
                f"config.dataset.root: no folder {folder}; reading what is packed in {packed}"
            )
        builder = packing.prepare(packed, records)
        return {split: packing.open_split(builder, split) for split in get_args(Split)}


def by_split(records: Sequence[Record]) -> dict[str, Source]:
    """Return the records as one source for each split; a split may be empty."""
    return {
        split: FolderSource([record for record in records if record.split == split])
        for split in get_args(Split)
    }


def require_test_images(config: Config, source: Source) -> None:
    """Require images to evaluate on.

    Args:
      config: configuration of the run.
      source: the test split.

    Raises:
      UserError: there are none; states what is there instead.
    """
    if not source.records:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: {no_test_images(config)}. To fit "
            "only, use --mode=train"
        )


def no_test_images(config: Config) -> str:
    """Describe what is there instead of test images, and where layouts expect them."""
    name, dataset = config.dataset.name, config.dataset
    base, there = LAYOUTS[name].folder(dataset.root, config.category), ""
    if paths.is_folder(base):
        folders = files.subfolders(base)
        there = f"; {base} holds {files.quoted(folders) or 'no folder'}"
    expected = [
        f"{LAYOUTS[one].test} (config.dataset.name={one})"
        for one in dict.fromkeys((name, "mvtec_ad", "folder"))
        if LAYOUTS[one].test
    ]
    return (
        f"no test images{there}; expected normal and anomalous ones in {' or '.join(expected)}"
    )
