"""Datasets: a folder layout is a pure function from a root folder to records.

`LAYOUTS[name](root, category)` lists a dataset's images; `tfds_builder` packs the
same records into files of another format. Nothing here imports JAX.
"""

from collections.abc import Callable

from padim_jax.datasets.folder import folder
from padim_jax.datasets.mvtec_ad import mvtec_ad
from padim_jax.datasets.records import Record
from padim_jax.paths import Path


def _synthetic(root: Path, category: str) -> list[Record]:
    # Drawing needs SciPy, which checking a configuration should not wait for.
    from padim_jax.datasets.synthetic import synthetic

    return synthetic(root, category)


LAYOUTS: dict[str, Callable[[Path, str], list[Record]]] = {
    "mvtec_ad": mvtec_ad,
    "folder": folder,
    "synthetic": _synthetic,
}
