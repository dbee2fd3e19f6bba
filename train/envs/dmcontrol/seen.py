"""DMControl tasks seen: pictures of 64x64 instead of the state, at the least that the same pixels cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from ..base import Array
from ..pixels import FRAMES, SIZE, Stack
from .task import DMControl


class Pixels(DMControl):
    """Three stacked 64x64 frames, channels first, instead of the state.

    dm_control draws in the corner of a buffer of 640x480, several samples a pixel, that is cleared and resolved as a
    whole for each picture, and makes a scene anew for each. Here the buffer is as large as the frames until a larger
    picture is asked for, and the scene is kept.
    """

    def __init__(self, task: str, seed: int, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, seed, settings)
        self.frames, self.obs_shape = FRAMES, (3 * FRAMES, SIZE, SIZE)
        self._stack = Stack(FRAMES)
        buffer = self.env.physics.model.vis.global_
        self._whole = buffer.offwidth, buffer.offheight
        buffer.offwidth = buffer.offheight = SIZE
        self._camera: Any = None

    @override
    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        physics, buffer = self.env.physics, self.env.physics.model.vis.global_
        if max(width, height) > SIZE and (buffer.offwidth, buffer.offheight) != self._whole:
            buffer.offwidth, buffer.offheight = self._whole
            if physics._contexts:
                physics._free_rendering_contexts()
        if (width, height) != (SIZE, SIZE):
            return super().draw(width, height)
        if self._camera is None:
            from dm_control.mujoco.engine import Camera

            self._camera = Camera(physics, SIZE, SIZE, self.camera_id)
        picture: NDArray[np.uint8] = self._camera.render()
        return picture.copy()  # of the camera's own buffer

    def _observe(self, first: bool = False) -> Array:
        return self._stack(self.render(SIZE, SIZE).transpose(2, 0, 1), first)

    @override
    def reset(self) -> Array:
        super().reset()
        return self._observe(first=True)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return (self._observe(), *rest)  # type: ignore[return-value]
