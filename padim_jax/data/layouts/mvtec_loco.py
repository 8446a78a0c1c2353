"""MVTec LOCO AD: logical and structural anomalies.

    root/category/train/good/*.png
    root/category/validation/good/*.png
    root/category/test/{good,logical_anomalies,structural_anomalies}/*.png
    root/category/ground_truth/<defect type>/<name>/{000,001,..}.png

An image has one mask for each of its defects; a pixel is anomalous if any mask marks it. The
grey level of a mask (of defects_config.json) states how much of a defect has to be found, for
the dataset's own metric (saturated PRO), which is not computed here.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly
Detection and Localization", IJCV 130, 2022. Licence: CC BY-NC-SA 4.0.
"""

from padim_jax.data.layouts.tree import Tree

TREE = Tree(
    "MVTec LOCO AD",
    "https://www.mvtec.com/company/research/datasets/mvtec-loco",
    ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
    mask="{stem}",
    several_masks=True,
)
