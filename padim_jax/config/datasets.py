"""Supported datasets: names as plain data, so that a configuration is checked quickly."""

# Folder layouts, each a module of `padim_jax.data.layouts`.
LAYOUTS = (
    "mvtec_ad",
    "mvtec_loco",
    "mvtec_3d_ad",
    "mvtec_ad_2",
    "visa",
    "btad",
    "mpdd",
    "ksdd2",
    "stc",
    "magnetic_tile",
    "folder",
    "synthetic",
)

# MVTec AD's categories in the order of the published tables: textures first.
MVTEC_AD = (
    *("carpet", "grid", "leather", "tile", "wood"),
    *("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush"),
    *("transistor", "zipper"),
)
