"""MVTec AD's folder layout, read in place.

    root/category/train/good/*.png
    root/category/test/{good,<defect type>}/*.png
    root/category/ground_truth/<defect type>/<name>_mask.png

Bergmann et al., "MVTec AD - A Comprehensive Real-World Dataset for Unsupervised
Anomaly Detection", CVPR 2019. Licence: CC BY-NC-SA 4.0.
"""

from padim_jax.config.datasets import MVTEC_AD
from padim_jax.data.layouts.tree import Tree
from padim_jax.data.records import Record
from padim_jax.system.paths import Path

URL = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
TREE = Tree("MVTec AD", URL, MVTEC_AD)


def mvtec_ad(root: Path, category: str) -> list[Record]:
    """List the images of one category of MVTec AD; see `Tree.records`.

    Args:
      root: folder that holds the category folders.
      category: a folder below `root`.

    Returns:
      The records.
    """
    return TREE.records(root, category)
