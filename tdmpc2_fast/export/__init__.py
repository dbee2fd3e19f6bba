"""A model's plan and policy prior as files for other runtimes: ONNX, `torch.export` and AOTInductor.

`graphs.py` has what is exported and which inputs it takes, `onnx_file.py` and `torch_package.py` write it.
"""

OPSETS = (18, 23)
"""The first and the last opset of ONNX that plans are written in."""
DEFAULT_OPSET = 20
"""The first one whose image sampling, of pixels, has the names of today."""
