"""Videos: what goes in comes out of the file, and a name never stands for half a video."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted_env
import torch
from numpy.typing import NDArray

from tdmpc2_fast.errors import InputError
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.pictures.frames import rgb
from tdmpc2_fast.train.pictures.video import Film, VideoWriter

imageio = pytest.importorskip("imageio.v2")
pytest.importorskip("imageio_ffmpeg")


def frame(shade: int, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """A dark ground with a bright left half, so that rows and columns cannot be swapped unnoticed."""
    picture = np.full((height, width, 3), shade, np.uint8)
    picture[:, : width // 2, 0] = 250
    return picture


def read(path: Path) -> tuple[list[NDArray[np.uint8]], dict[str, object]]:
    with imageio.get_reader(path) as reader:
        return [np.asarray(f) for f in reader.iter_data()], reader.get_meta_data()


@pytest.mark.parametrize("frames_per_second", [20.0, 100 / 3])
def test_what_goes_in_comes_out(tmp_path: Path, frames_per_second: float) -> None:
    path = tmp_path / "new" / "folder" / "a.mp4"
    shades = [0, 60, 120, 180, 240]
    with VideoWriter(path, frames_per_second) as video:
        for shade in shades:
            video.add(frame(shade))
            assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    frames, meta = read(path)
    assert len(frames) == len(shades)
    assert meta["fps"] == pytest.approx(frames_per_second, abs=0.01)
    assert meta["codec"] == "h264"
    assert str(meta["pix_fmt"]).startswith("yuv420p")
    for picture, shade in zip(frames, shades, strict=True):
        assert picture.shape == (64, 96, 3)
        assert np.abs(picture[8:-8, 56:].astype(int) - shade).max() < 12  # lossy
        assert np.abs(picture[8:-8, 8:40, 0].astype(int) - 250).max() < 12


def test_browsers_can_start_before_the_end_of_the_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 10) as video:
        video.add(frame(0))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_become_even(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 10) as video:
        video.add(frame(100, 33, 51))
    [picture], _ = read(tmp_path / "a.mp4")
    assert picture.shape == (34, 52, 3)
    assert abs(int(picture[-1, -1, 2]) - 100) < 12


def test_a_caption_is_drawn_below_and_only_there(tmp_path: Path) -> None:
    for name, caption in (("a", ""), ("b", "walker-walk   return 12.3")):
        with VideoWriter(tmp_path / f"{name}.mp4", 10) as video:
            video.add(frame(60, 384, 384), caption)
    [plain], [captioned] = (read(tmp_path / f"{n}.mp4")[0] for n in "ab")
    changed = np.abs(plain.astype(int) - captioned).max(-1) > 60
    assert changed[360:].sum() > 100
    assert not changed[:350].any()


def broken_off(path: Path, error: type[BaseException]) -> None:
    with VideoWriter(path, 10, overwrite=True) as video:
        video.add(frame(0))
        raise error


def test_an_exception_inside_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        broken_off(tmp_path / "a.mp4", ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("mine")
    with pytest.raises(InputError, match="is taken"):
        VideoWriter(path, 10)
    with pytest.raises(KeyboardInterrupt):
        broken_off(path, KeyboardInterrupt)
    assert path.read_text() == "mine"
    with VideoWriter(path, 10, overwrite=True) as video:
        video.add(frame(0))
    assert len(read(path)[0]) == 1


def test_what_is_no_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'\.mp4'"):
        VideoWriter(tmp_path / "a.avi", 10)
    with pytest.raises(InputError, match="above 0"):
        VideoWriter(tmp_path / "a.mp4", 0)
    with VideoWriter(tmp_path / "a.mp4", 10) as video:
        video.add(frame(0))
        with pytest.raises(InputError, match="float32"):
            video.add(frame(0).astype(np.float32))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="as the first one"):
            video.add(frame(0, 32, 32))
    assert len(read(tmp_path / "a.mp4")[0]) == 1
    with pytest.raises(InputError, match="without a frame"), VideoWriter(tmp_path / "b.mp4", 10):
        pass
    assert not (tmp_path / "b.mp4").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    with pytest.raises(RenderError, match=r"imageio.*tdmpc2-fast\[train\]"), VideoWriter(tmp_path / "a.mp4", 10):
        pass


@pytest.mark.parametrize(("ffmpeg", "words"), [("/nowhere/ffmpeg", "/nowhere"), ("false", "ffmpeg")])
def test_an_ffmpeg_that_does_not_work_is_an_error(tmp_path: Path, ffmpeg: str, words: str) -> None:
    program = f"""
import numpy as np
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.video import VideoWriter
try:
    with VideoWriter({str(tmp_path / "a.mp4")!r}, 10) as video:
        for _ in range(200):
            video.add(np.zeros((384, 384, 3), np.uint8))
except RenderError as e:
    print("RenderError", e)
"""
    env = {**os.environ, "IMAGEIO_FFMPEG_EXE": ffmpeg}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.startswith("RenderError"), done.stdout + done.stderr
    assert words in done.stdout
    assert "IMAGEIO_FFMPEG_EXE" in done.stdout
    assert list(tmp_path.iterdir()) == []


class Filmed(scripted_env.Scripted):
    """Draws what it is given, decision by decision; the last one again where there is no more."""

    def __init__(self, *frames: Any, rate: Any = 20.0, steps: int = 50) -> None:
        super().__init__(1)
        self.frames, self.frames_per_second, self.max_episode_steps = list(frames) or [frame(60)], rate, steps
        self.drawn = 0

    def render(self, width: int = 384, height: int = 384) -> Any:
        found = self.frames[min(self.drawn, len(self.frames) - 1)]
        self.drawn += 1
        return found() if callable(found) else found


def film(path: Path, env: Filmed, count: int = 50) -> list[str]:
    """Film so many states of an episode; what was warned of."""
    warned: list[str] = []
    with Film(path, env, warned.append) as found:
        for i in range(count):
            found.add(f"decision {i}")
    return warned


def raising(error: BaseException) -> Callable[[], Any]:
    def raises() -> Any:
        raise error

    return raises


GREY = np.arange(64 * 96, dtype=np.uint8).reshape(64, 96)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)


@pytest.mark.parametrize(
    ("came", "expected"),
    [
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (np.dstack([COLOUR, GREY]), COLOUR),
        (COLOUR.transpose(2, 0, 1), COLOUR),
        (COLOUR / 255, COLOUR),
        (torch.from_numpy(COLOUR[None] / 255).float(), COLOUR),
        ([np.zeros_like(COLOUR), COLOUR], COLOUR),
        (COLOUR.astype(np.int64), COLOUR),
        (COLOUR.astype(np.float32), COLOUR),
        (GREY > 100, np.stack([255 * (GREY > 100)] * 3, -1)),
        (np.full((64, 96, 3), np.nan), np.zeros((64, 96, 3))),
        (COLOUR[::-1, ::2], COLOUR[::-1, ::2]),
    ],
)
def test_whatever_a_renderer_returns_becomes_one_kind_of_picture(came: Any, expected: NDArray[np.uint8]) -> None:
    picture = rgb(came)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    ("came", "words"), [(None, "None"), ([], "None"), ("text", "<U4"), (np.zeros((5, 5, 7)), r"float64 \(5, 5, 7\)")]
)
def test_what_is_no_picture_is_named(came: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"frame: got {words}.*, allowed: a picture"):
        rgb(came)


@pytest.mark.parametrize(
    ("rate", "steps", "count", "per_second", "seconds"),
    [
        (20, 50, 51, 20, 51 / 20),  # as it is
        (50, 500, 501, 25, 251 / 25),  # every second decision
        (1000, 200, 201, 25, 2.04),  # a tenth of its speed
        (10, 5, 6, 2.5, 2.4),
        (20, 500, 6, 20, 2.0),  # ended early: its last picture is held
        (0.5, 4, 5, 0.5, 10),
    ],
)
def test_a_film_is_long_enough_to_be_seen(
    tmp_path: Path, rate: float, steps: int, count: int, per_second: float, seconds: float
) -> None:
    env = Filmed(*(frame(i * 40 % 250) for i in range(count)), rate=rate, steps=steps)
    assert film(tmp_path / "a.mp4", env, count) == []
    frames, meta = read(tmp_path / "a.mp4")
    assert meta["fps"] == pytest.approx(per_second, rel=0.01)
    assert len(frames) / per_second == pytest.approx(seconds, abs=1 / per_second)
    assert np.abs(frames[-1][8:40, 56:].astype(int) - (env.drawn - 1) * 40 % 250).max() < 12  # where it ended
    assert env.drawn <= 0.6 * count or rate < 50


@pytest.mark.parametrize("rate", [None, 0, -1, float("nan"), float("inf"), "fast"])
def test_an_environment_without_a_frame_rate_is_filmed(tmp_path: Path, rate: Any) -> None:
    [warned] = film(tmp_path / "a.mp4", Filmed(rate=rate, steps=90), 91)
    assert f"no frame rate ({rate}): it is filmed at 30 decisions a second" in warned
    assert read(tmp_path / "a.mp4")[1]["fps"] == 30


def test_pictures_of_other_forms_and_sizes_are_fitted_to_the_first(tmp_path: Path) -> None:
    env = Filmed(frame(60), frame(60, 32, 48), frame(60) / 255, np.dstack([frame(60), GREY]), steps=4, rate=2)
    assert film(tmp_path / "a.mp4", env, 4) == []
    frames, _ = read(tmp_path / "a.mp4")
    assert len(frames) == 4
    for picture in frames:
        assert np.abs(picture[8:40, 56:].astype(int) - 60).max() < 12


@pytest.mark.parametrize(
    "trouble",
    [None, [], np.zeros((5, 5, 7)), raising(ZeroDivisionError("paint")), raising(StopIteration("paint")), "no picture"],
)
@pytest.mark.parametrize("at", [0, 3])
def test_a_renderer_that_fails_costs_the_video_only(tmp_path: Path, trouble: Any, at: int) -> None:
    [warned] = film(tmp_path / "a.mp4", Filmed(*[frame(60)] * at, trouble))
    assert warned.startswith("no video: ")
    assert list(tmp_path.iterdir()) == []


def test_what_ends_a_run_passes_a_film(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        film(tmp_path / "a.mp4", Filmed(frame(60), raising(KeyboardInterrupt())))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_costs_the_video_only(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "a.mp4", tmp_path / "file" / "b.mp4", tmp_path / "c.avi"):
        assert len(film(path, Filmed(), 3)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "file"]


@pytest.mark.parametrize(
    "program",
    [
        "exit 1",
        "head -c 30000 >/dev/null; exit 1",
        # what is left where the disk gets full, or the machine kills it in the middle
        'for last; do :; done; head -c 100 /dev/zero >"$last"; cat >/dev/null; exit 1',
        'ulimit -f 4; exec "$REAL" "$@"',
    ],
)
def test_an_ffmpeg_that_dies_costs_the_video_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    import imageio_ffmpeg

    monkeypatch.setenv("REAL", imageio_ffmpeg.get_ffmpeg_exe())
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f"#!/bin/sh\n{program} 2>/dev/null\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    [warned] = film(tmp_path / "videos" / "a.mp4", Filmed(noise))
    assert warned.startswith("no video: ffmpeg")
    assert len(warned.splitlines()) == 1
    assert list((tmp_path / "videos").iterdir()) == []
