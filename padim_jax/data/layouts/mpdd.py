"""MPDD, the Metal Parts Defect Detection dataset, in MVTec AD's layout.

    root/category/train/good/*.png
    root/category/test/{good,<defect type>}/*.png
    root/category/ground_truth/<defect type>/<name>_mask.png

Jezek et al., "Deep learning-based defect detection of metal parts: evaluating current methods
in complex conditions", ICUMT 2021. Licence: see docs/datasets.md.
"""

from padim_jax.data.layouts.tree import Tree

TREE = Tree(
    "MPDD",
    "https://github.com/stepanje/MPDD",
    (
        "bracket_black", "bracket_brown", "bracket_white",
        "connector", "metal_plate", "tubes",
    ),
)  # fmt: skip
