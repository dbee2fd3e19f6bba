"""Checkpoints: round trips, official files of both generations, and files that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_multitask
from safetensors.torch import save_file
from test_world_model import old_generation

import tdmpc2_fast.checkpoint
import tdmpc2_fast.files
from tdmpc2_fast import TDMPC2, load
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import CheckpointError


def same(a: TDMPC2, b: TDMPC2) -> bool:
    x, y = (tensors_only(agent.model.state_dict()) for agent in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("name", ["weights", "weights.safetensors", "weights.pt", "new/folder/weights"])
@pytest.mark.parametrize("multitask", [False, True])
def test_round_trip(tmp_path: Path, name: str, multitask: bool) -> None:
    cfg = tiny_multitask() if multitask else tiny_config()
    agent, other = TDMPC2(cfg), TDMPC2(cfg.replace(seed=3))
    agent.save(tmp_path / name)
    other.load(tmp_path / name)
    assert same(agent, other)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_who_may_read_a_checkpoint_is_up_to_the_umask(tmp_path: Path, name: str) -> None:
    before = os.umask(0o027)
    try:
        TDMPC2(tiny_config()).save(tmp_path / name)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_an_agent_comes_back_from_its_file_alone(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config(episodic=True, rho=0.7))
    agent.save(tmp_path / "a")
    again = load(tmp_path / "a.safetensors", seed=5)
    assert same(agent, again)
    assert again.cfg == agent.cfg.replace(seed=5)
    agent.save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="carry no config"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("old", [False, True])
def test_official_files_of_both_generations(tmp_path: Path, old: bool) -> None:
    agent, other = TDMPC2(tiny_config()), TDMPC2(tiny_config(seed=2))
    state = agent.model.state_dict()
    torch.save({"model": old_generation(state) if old else state}, tmp_path / "official.pt")
    other.load(str(tmp_path / "official.pt"))
    assert same(agent, other)


def test_our_pt_file_has_every_entry_the_official_loader_wants(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config())
    agent.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    for group in ("_Qs.params.", "_detach_Qs_params.", "_target_Qs_params."):
        assert state[f"{group}__batch_size"] == torch.Size([3])
        assert state[f"{group}__device"] is None
        assert f"{group}2.weight" in state


def test_a_checkpoint_of_another_size_is_named(tmp_path: Path) -> None:
    TDMPC2(tiny_config(mlp_dim=32)).save(tmp_path / "big")
    agent = TDMPC2(tiny_config())
    before = tensors_only(agent.model.state_dict())
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(CheckpointError, match=r"another model.*\(32, .*this model has \(24, .*model_size"):
        agent.load(tmp_path / "big")
    assert all(torch.equal(v, before[k]) for k, v in tensors_only(agent.model.state_dict()).items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    agent = TDMPC2(tiny_config())
    path = tmp_path / f"a{suffix}"
    agent.save(path)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        agent.load(path)


def test_altered_bytes_are_noticed(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config())
    agent.save(tmp_path / "a")
    blob = bytearray((tmp_path / "a.safetensors").read_bytes())
    blob[-5] ^= 1  # a weight: the header is untouched
    (tmp_path / "a.safetensors").write_bytes(blob)
    with pytest.raises(CheckpointError, match="checksum"):
        agent.load(tmp_path / "a")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": Malicious(marker)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(marker)))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=r"refused|not a checkpoint") as caught:
            TDMPC2(tiny_config()).load(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's own message says how to run it
    assert not marker.exists()


def test_missing_files_and_wrong_things_are_named(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config())
    with pytest.raises(CheckpointError, match="no such file"):
        agent.load(tmp_path / "nothing")
    for metadata, words in (
        ({}, "no manifest"),
        ({"manifest": "{"}, "no manifest"),
        ({"manifest": json.dumps({"format": "other/9"})}, "other/9"),
    ):
        save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=words):
            agent.load(tmp_path / "a")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="list"):
        agent.load(tmp_path / "list.pt")


def test_a_crash_between_the_two_files_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, other = TDMPC2(tiny_config()), TDMPC2(tiny_config(seed=8))
    agent.save(tmp_path / "a")
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(tdmpc2_fast.files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path / "a")
    monkeypatch.undo()
    assert same(load(tmp_path / "a"), other)
    (tmp_path / "a.json").unlink()
    assert same(load(tmp_path / "a"), other)


def test_another_range_of_the_policy_is_not_loaded_silently(tmp_path: Path) -> None:
    TDMPC2(tiny_config(log_std_min=-5)).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="log_std_min"):
        TDMPC2(tiny_config()).load(tmp_path / "a")


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, other = TDMPC2(tiny_config()), TDMPC2(tiny_config(seed=8))
    agent.save(tmp_path / "a.pt")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tdmpc2_fast.checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path / "a.pt")
    monkeypatch.undo()
    other.load(tmp_path / "a.pt")
    assert same(agent, other)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
