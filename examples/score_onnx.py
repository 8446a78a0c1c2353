"""Scores images by an ONNX file of padim_jax, with onnxruntime and Pillow alone.

python examples/score_onnx.py part.onnx image.png [...]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

options = onnxruntime.SessionOptions()
options.log_severity_level = (
    3  # no warning that a threshold which may be changed is no constant
)
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
settings = json.loads(session.get_modelmeta().custom_metadata_map["padim_jax"])["config"][
    "image"
]
(height, width), method = settings["resize"], settings["method"].upper()
for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling[method])
    if settings["crop"]:
        rows, columns = settings["crop"]
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        image = image.crop((left, top, left + columns, top + rows))
    outputs = session.run(None, {"images": np.asarray(image)[None]})
    found = dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))
    print(
        path,
        found["score"][0],
        found.get("rarity", [""])[0],
        found.get("is_anomalous", [""])[0],
    )
