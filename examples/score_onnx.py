"""Scores images by an ONNX file of padim_jax, with onnxruntime and Pillow alone.

python examples/score_onnx.py part.onnx image.png [...]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # it warns that a threshold which may be changed is no constant
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
model = json.loads(session.get_modelmeta().custom_metadata_map["padim_jax"])
size, crop, method = (model["config"]["image"][x] for x in ("resize", "crop", "method"))
for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB")
    image = image.resize(size[::-1], Image.Resampling[method.upper()])
    if crop:
        top, left = (round((a - b) / 2) for a, b in zip(size, crop, strict=True))
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    names = [output.name for output in session.get_outputs()][1:]
    print(path, *(x[0] for x in session.run(names, {"images": np.asarray(image)[None]})))
