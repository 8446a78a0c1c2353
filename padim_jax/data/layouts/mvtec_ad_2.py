"""MVTec AD 2: its public test set.

    root/category/train/good/*.png
    root/category/validation/good/*.png
    root/category/test_public/{good,bad}/*.png
    root/category/test_public/ground_truth/bad/<name>_mask.png

The images of test_private and test_private_mixed are published without labels and masks, for
the authors' evaluation server; they are not listed. `--mode=predict` scores them.

Heckler-Kram et al., "The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly
Detection", arXiv 2503.21622, 2025. Licence: CC BY-NC-SA 4.0.
"""

from padim_jax.data.layouts.tree import Tree

TREE = Tree(
    "MVTec AD 2",
    "https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
    ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
    test="test_public",
    unlisted=("test_private", "test_private_mixed"),
    masks="test_public/ground_truth/{type}",
)
