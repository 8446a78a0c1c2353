"""MVTec 3D-AD: its colour images; the point clouds in xyz/ are not read.

    root/category/train/good/rgb/*.png
    root/category/validation/good/rgb/*.png
    root/category/test/{good,<defect type>}/rgb/*.png
    root/category/test/<defect type>/gt/<name>.png

Normal test images have masks too, without a defect pixel; these are not read.

Bergmann et al., "The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and
Localization", VISAPP 2022. Licence: CC BY-NC-SA 4.0.
"""

from padim_jax.data.layouts.tree import Tree

TREE = Tree(
    "MVTec 3D-AD",
    "https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    (
        "bagel", "cable_gland", "carrot", "cookie", "dowel",
        "foam", "peach", "potato", "rope", "tire",
    ),
    images="rgb",
    masks="test/{type}/gt",
    mask="{stem}",
)  # fmt: skip
