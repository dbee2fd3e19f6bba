"""What renderers return, as one kind of picture: (height, width, 3), uint8."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import InputError

_CHANNELS = (1, 3, 4)


def rgb(frame: Any) -> NDArray[np.uint8]:
    """Return what a renderer gave, an array, a tensor or a list of them, as a picture (height, width, 3), uint8.

    Grey and transparent pictures, channels in front, a batch or a list (of which the last one counts), truth values
    and floats from 0 to 1 are understood.

    Raises:
        InputError: anything else.
    """
    if isinstance(frame, (list, tuple)):
        frame = frame[-1] if frame else None
    x = np.asarray(frame.detach().cpu() if hasattr(frame, "detach") else frame)
    x = x[-1] if x.ndim == 4 and len(x) else x[..., None] if x.ndim == 2 else x
    if x.ndim == 3 and x.shape[2] not in _CHANNELS and x.shape[0] in _CHANNELS:
        x = x.transpose(1, 2, 0)
    if x.ndim != 3 or x.shape[2] not in _CHANNELS or not x.size or x.dtype.kind not in "buif":
        came = None if frame is None else f"{x.dtype} {x.shape}"
        raise InputError(f"frame: got {came}, allowed: a picture (height, width, 3) of uint8")
    if x.dtype != np.uint8:
        unit = x.dtype.kind == "b" or (x.dtype.kind == "f" and not (x > 1).any())
        x = np.nan_to_num(x.astype(np.float32) * (255 if unit else 1)).clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 3)) if x.shape[2] == 1 else x[..., :3])


def fitted(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return a picture (height, width, 3), uint8, with this one in the middle, as large as fits."""
    from PIL import Image, ImageOps  # of imageio and matplotlib, both in the extra [train]

    return np.asarray(ImageOps.pad(Image.fromarray(picture), (width, height)))
