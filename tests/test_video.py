"""Videos: what goes in comes out of the file, and a name never stands for half a video."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tdmpc2_fast.errors import InputError
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.video import VideoWriter

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
