"""Images as the pixel encoder takes them: uint8 (C, 64, 64), frames one after another."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .answers import array, finite, unusable

SIZE = 64  # pixels a side, as in the official code
FRAMES = 3  # of which an observation is made where the environment stacks none itself
_SMALLEST = 16  # pixels a side; what is smaller is a grid of numbers
_MOST_CHANNELS = 16


class Stack:
    """The last frames of an episode, one after another; the first one fills all places."""

    def __init__(self, frames: int) -> None:
        self._kept: deque[NDArray[np.uint8]] = deque(maxlen=frames)

    def __call__(self, frame: NDArray[np.uint8], first: bool = False) -> NDArray[np.uint8]:
        """Return the frames up to this one, (C * frames, H, W)."""
        self._kept.extend([frame] * (self._kept.maxlen or 1 if first else 1))
        return np.concatenate(self._kept)


class Images:
    """How a Box of images becomes observations.

    Images are (H, W), (H, W, C) or (C, H, W) with at most 16 channels, or stacks (K, ...) of
    those, of uint8 or of numbers from 0 to 1 or to 255. A frame alone is stacked with the two
    before it, as officially; one that is a stack itself (K frames, or four channels and more)
    is not. Another size is averaged or repeated to 64x64.

    frames: how many are stacked here; 1 where the environment may have done so itself.
    """

    def __init__(self, box: Any) -> None:
        self._box, self._order = box, _channels_first(box.shape)
        channels = int(np.prod([box.shape[i] for i in self._order[:-2]]))
        self.frames = FRAMES if channels < 4 and (len(box.shape) < 4 or box.shape[0] == 1) else 1
        self.shape = (channels * self.frames, SIZE, SIZE)
        self._stack = Stack(self.frames)
        self._scale = 255 / _highest(box)

    def __call__(self, obs: Any, field: str, first: bool) -> NDArray[np.uint8]:
        """Return the observation, uint8 (C, 64, 64)."""
        image = array(obs, self._box.shape, None, field).transpose(self._order)
        image = image.reshape(-1, *image.shape[-2:])
        if self._scale != 1 or image.dtype != np.uint8:
            finite(image, field)
            white = 255 / self._scale
            fractions = self._box.dtype.kind != "f" and image.dtype.kind == "f" and (image % 1).any()
            if fractions or image.min() < 0 or image.max() > white:
                raise unusable(field, image, f"{self._box.dtype} from 0 to {white:g}")
            image = np.clip(np.rint(image.astype(np.float64) * self._scale), 0, 255).astype(np.uint8)
        return self._stack(image if image.shape[1:] == (SIZE, SIZE) else _resized(image), first)


def is_image(space: Any) -> bool:
    """Tell whether a space is a Box of images, by shape, dtype and bounds."""
    if len(getattr(space, "shape", None) or ()) not in (2, 3, 4) or not hasattr(space, "low"):
        return False
    if not _channels_first(space.shape):
        return False
    if space.dtype == np.uint8:
        return True
    return len(space.shape) > 2 and bool((space.low == 0).all()) and _highest(space) in (1, 255)


def _highest(box: Any) -> float:
    """Return the number that is white: the one upper bound of all pixels, or 255 where they differ."""
    top = float(box.high.flat[0])
    return top if 0 < top <= 255 and (box.high == top).all() else 255.0 if box.dtype == np.uint8 else float("nan")


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order of axes that brings height and width to the end; () where a shape is no image's."""
    last = len(shape) - 1
    order = tuple(range(len(shape)))
    if last >= 2 and shape[last] <= _MOST_CHANNELS and shape[last] < min(shape[last - 2 : last]):
        order = (*order[: last - 2], last, last - 2, last - 1)
    elif last >= 2 and not (shape[last - 2] <= _MOST_CHANNELS and shape[last - 2] < min(shape[last - 1 :])):
        return ()
    return order if min(shape[i] for i in order[-2:]) >= _SMALLEST else ()


def _resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import torch

    x = torch.nn.functional.interpolate(torch.from_numpy(image).float().unsqueeze(0), (SIZE, SIZE), mode="area")
    return x[0].round().to(torch.uint8).numpy()
