"""BTAD, the beanTech Anomaly Detection dataset: three products, 01 to 03.

    root/category/train/ok/*
    root/category/test/{ok,ko}/*
    root/category/ground_truth/ko/<name>.*

Images and masks are .bmp/.png (01), .png/.png (02) and .bmp/.bmp (03): a mask has its image's
name, whatever its suffix.

Mishra et al., "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and
Localization", ISIE 2021. Licence: see docs/datasets.md, sources differ.
"""

from padim_jax.data.layouts.tree import Tree

TREE = Tree(
    "BTAD",
    "https://github.com/pankajmishra000/VT-ADL",
    ("01", "02", "03"),
    good="ok",
    mask="{stem}",
)
