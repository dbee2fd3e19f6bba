"""Videos: RGB frames streamed into an mp4 that browsers and QuickTime play."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdmpc2_fast.errors import InputError

from ..envs.base import Env, RenderError
from .frames import fitted, rgb

_SECONDS = 2.0  # a film is at least so long
_PER_SECOND = 25.0  # pictures a film has about: more are not seen, and each costs a drawing
_USUAL_RATE = 30.0  # where an environment tells no rate
_NEEDS = "pip install 'tdmpc2-fast[train]' brings an ffmpeg with libx264; IMAGEIO_FFMPEG_EXE names another one"


class VideoWriter:
    """An mp4 (H.264, yuv420p) that appears under its name only when it is complete.

        with VideoWriter(path, env.frames_per_second) as video:
            video.add(env.render(), "walker-walk")

    Frames go to `NAME.partial.mp4` beside it, which gets its name when the block ends and is
    removed when an exception ends it. Encoding runs in a process of its own.

    Args:
        path: a name ending in `.mp4`; folders are made.
        frames_per_second: `Env.frames_per_second` shows simulated time at its true speed.
        overwrite: whether a file of this name may be replaced.

    Raises:
        InputError: a name that is taken or no mp4; on leaving the block, that no frame was added.
        RenderError: no package, ffmpeg or encoder to write it with.
    """

    def __init__(self, path: str | Path, frames_per_second: float, overwrite: bool = False) -> None:
        self.path, self.frames_per_second = Path(path), frames_per_second
        if self.path.suffix != ".mp4":
            raise InputError(f"path: got {str(path)!r}, allowed: a name ending in '.mp4'")
        if not 0 < frames_per_second < float("inf"):
            raise InputError(f"frames_per_second: got {frames_per_second}, allowed: above 0")
        if self.path.exists() and not overwrite:
            raise InputError(f"path: {str(path)!r} is taken; allowed: a new name, or overwrite=True")
        self._partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self._writer: Any = None
        self._shape: tuple[int, ...] | None = None
        self.frames = 0

    def __enter__(self) -> VideoWriter:
        """Find the encoder; the file is begun by the first frame."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            from imageio.v2 import get_writer

            # macro_block_size: sizes are even already; the default rounds them to 16
            self._writer = get_writer(
                self._partial,
                format="FFMPEG",
                fps=self.frames_per_second,
                codec="libx264",
                pixelformat="yuv420p",
                quality=None,
                macro_block_size=2,
                ffmpeg_log_level="error",
                output_params=["-movflags", "+faststart"],
            )
        except ModuleNotFoundError as e:
            raise RenderError(f"videos need {e.name}; {_NEEDS}") from e
        except (ImportError, RuntimeError) as e:
            raise RenderError(f"videos need ffmpeg: {e}; {_NEEDS}") from e
        return self

    def add(self, frame: NDArray[np.uint8], caption: str = "") -> None:
        """Append a frame (height, width, 3), uint8; all have one size. An odd size is rounded up by an edge.

        caption: drawn small along the lower edge, where given.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise InputError(f"frame: got {frame.dtype} {frame.shape}, allowed: uint8 (height, width, 3)")
        if self._shape not in (None, frame.shape):
            raise InputError(f"frame: got {frame.shape}, allowed: {self._shape}, as the first one")
        self._shape = frame.shape
        height, width, _ = frame.shape
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            self._writer.append_data(_captioned(frame, caption) if caption else frame)
        except (OSError, RuntimeError) as e:
            raise RenderError(f"ffmpeg ended: {str(e).splitlines()[0]}; {_NEEDS}") from e
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file, or leave none where an exception ended the block."""
        try:
            self._writer.close()
            if error is None:
                if not self.frames:
                    raise InputError(f"{self.path}: no video without a frame")
                if not self._partial.exists() or not _whole(self._partial):
                    raise RenderError(f"ffmpeg did not finish the file; is the disk full? {_NEEDS}")
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


class Film:
    """A video of an environment that never ends a run: where it fails, `warn` is told once.

    It runs at the environment's own speed, or slower where a whole episode would be over in less than two seconds
    (the caption says so), and holds its last picture until they are over. Where an environment acts often, not
    every decision is drawn.

    Args:
        path: as of `VideoWriter`, replaced if taken; None films nothing.
        env: the environment.
        warn: told why there is no video.
    """

    def __init__(self, path: Path | None, env: Env, warn: Callable[[str], None]) -> None:
        self._path, self._env, self._warn = path, env, warn
        self._video: VideoWriter | None = None
        self._every, self._speed = 1, ""
        self._added = 0
        self._caption: str | None = None  # of what was added last and not drawn
        self._drawn: tuple[NDArray[np.uint8], str] | None = None

    def __enter__(self) -> Film:
        """Begin the video."""
        if self._path is not None:
            self._try(self._begin, self._path)
        return self

    def _try(self, do: Callable[..., None], *args: Any) -> None:
        """Do it; where that fails, whatever drivers and encoders raise, there is no video and `warn` is told why."""
        try:
            do(*args)
        except Exception as e:
            video, self._video = self._video, None
            if video is not None:
                with suppress(Exception):  # what it follows from is told
                    video.__exit__(type(e), e, e.__traceback__)
            self._warn(f"no video: {e}")

    def _begin(self, path: Path) -> None:
        told = getattr(self._env, "frames_per_second", None)
        rate = told if isinstance(told, (int, float, np.number)) and 0 < told < math.inf else _USUAL_RATE
        if rate != told:
            self._warn(f"the environment has no frame rate ({told}): it is filmed at {rate:.0f} decisions a second")
        speed = min(1.0, self._env.max_episode_steps / float(rate) / _SECONDS)
        self._speed = f"   at {speed:.2g} of its speed" if speed < 1 else ""
        self._every = max(1, round(speed * rate / _PER_SECOND))
        self._video = VideoWriter(path, float(speed * rate / self._every), overwrite=True).__enter__()

    def add(self, caption: str) -> None:
        """Film the environment as it is now, one decision after the last one."""
        if self._video is not None:
            self._caption = caption
            if self._added % self._every == 0:
                self._try(self._draw, self._video)
            self._added += 1

    def _draw(self, video: VideoWriter) -> None:
        """Draw what was added last."""
        picture = rgb(self._env.render())
        if self._drawn is not None and picture.shape != self._drawn[0].shape:
            height, width, _ = self._drawn[0].shape
            picture = fitted(picture, width, height)
        self._drawn, self._caption = (picture, f"{self._caption}{self._speed}"), None
        video.add(*self._drawn)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the video, or leave none where an exception ended the block."""
        if self._video is not None:
            self._try(self._end, self._video, kind, error, trace)
            self._video = None

    def _end(self, video: VideoWriter, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            if self._caption is not None:
                self._draw(video)
            while self._drawn is not None and video.frames < _SECONDS * video.frames_per_second:
                video.add(*self._drawn)
        video.__exit__(kind, error, trace)


def _whole(path: Path) -> bool:
    """Tell whether the boxes of an mp4 add up to its size; those of one whose ffmpeg died do not."""
    size, at, names = path.stat().st_size, 0, set()
    with open(path, "rb") as f:
        while 0 <= at < size:
            f.seek(at)
            head = f.read(16).ljust(16, b"\0")
            length, name = struct.unpack(">I4s", head[:8])
            length = struct.unpack(">Q", head[8:])[0] if length == 1 else length
            names.add(name)
            at = at + length if length >= 8 else -1
    return at == size and {b"moov", b"mdat"} <= names


def _captioned(frame: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Return the frame with a line of text in its lower left corner, legible on any ground."""
    from PIL import Image, ImageDraw, ImageFont  # imageio's own dependency

    picture = Image.fromarray(frame)
    size = max(9, picture.height // 28)
    ImageDraw.Draw(picture).text(
        (size // 2, picture.height - size // 2),
        text,
        anchor="ls",
        font=ImageFont.load_default(size),
        fill="white",
        stroke_width=max(1, size // 9),
        stroke_fill="black",
    )
    return np.asarray(picture)
