"""Files of tensors: whole or absent, and an error of the operating system where they cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tdmpc2_fast.errors import CheckpointError
from tdmpc2_fast.model.files import read_metadata, read_tensors, replacing, write_tensors

safetensors = pytest.importorskip("safetensors")
TENSORS = dict(a=torch.arange(6.0).view(2, 3).T, b=torch.tensor([1, 2]), c=torch.ones(2, requires_grad=True))


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS, dict(made="here"))
    tensors, metadata = read_tensors(tmp_path / "x.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(x, TENSORS[k]) and x.dtype == TENSORS[k].dtype for k, x in tensors.items())
    assert metadata == read_metadata(tmp_path / "x.safetensors") == dict(made="here")
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert read_tensors(tmp_path / "x.safetensors")[1] == read_metadata(tmp_path / "x.safetensors") == {}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()

    def half_written(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    with pytest.raises(OSError, match=r"x\.safetensors: No space left on device"):
        write_tensors(path, dict(a=torch.zeros(1)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    for error, told in ((ZeroDivisionError(), None), (OSError(28, "full"), str(path)), (OSError(5, "bad", "y"), "y")):
        with pytest.raises(type(error)) as raised:
            write_in_part(path, error)
        assert getattr(raised.value, "filename", None) == told
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def write_in_part(path: Path, error: Exception) -> None:
    with replacing(path) as tmp:
        tmp.write_text("half")
        raise error


def test_files_are_as_readable_as_others_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_file_of_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-5])
    for read in (read_tensors, read_metadata):
        for name in (path, tmp_path / "absent"):
            with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
                read(name)
