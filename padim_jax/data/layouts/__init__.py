"""Datasets: a folder layout is a pure function from a root folder to records.

`LAYOUTS[name].records(root, category, seed)` lists a dataset's images; `packing` packs
the same records into files of another format. Nothing here imports JAX.
"""

from padim_jax.data.layouts import (
    btad,
    folder,
    ksdd2,
    magnetic_tile,
    mpdd,
    mvtec_3d_ad,
    mvtec_ad,
    mvtec_ad_2,
    mvtec_loco,
    stc,
    visa,
)
from padim_jax.data.layouts.layout import Layout, split_given
from padim_jax.data.records import Record
from padim_jax.system.paths import Path


def _synthetic(root: Path, category: str) -> list[Record]:
    # Drawing needs SciPy, which is slow to import and not needed to check a configuration.
    from padim_jax.data.layouts.synthetic import synthetic

    return synthetic(root, category)


LAYOUTS: dict[str, Layout] = {
    "mvtec_ad": mvtec_ad.TREE.layout,
    "mvtec_loco": mvtec_loco.TREE.layout,
    "mvtec_3d_ad": mvtec_3d_ad.TREE.layout,
    "mvtec_ad_2": mvtec_ad_2.TREE.layout,
    "visa": visa.LAYOUT,
    "btad": btad.TREE.layout,
    "mpdd": mpdd.TREE.layout,
    "ksdd2": ksdd2.LAYOUT,
    "stc": stc.LAYOUT,
    "magnetic_tile": magnetic_tile.LAYOUT,
    "folder": Layout(
        split_given(folder.folder),
        folder.categories,
        unused=folder.unused,
        test="val/good and val/bad (or val/<defect type>)",
    ),
    "synthetic": Layout(split_given(_synthetic), lambda _: ["part"]),
}
