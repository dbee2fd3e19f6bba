"""Checkpoints: round trips, official files of both generations, and files that must be refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_multitask
from safetensors.torch import save_file
from test_world_model import old_generation

import tdmpc2_fast.model.checkpoint
import tdmpc2_fast.model.files
from tdmpc2_fast import TDMPC2, Config, Planner, load
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.config import MODEL_SIZES
from tdmpc2_fast.errors import BackendError, CheckpointError, ConfigError, InputError
from tdmpc2_fast.train import cli


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
    with pytest.raises(CheckpointError, match=r"another model.*mlp_dim is 32 in it and 24 here; set mlp_dim=32"):
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
        assert "safe_globals" not in str(caught.value)
        assert "\t" not in str(caught.value)
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
    for wrong, name in ((None, "None"), (3, "int"), (b"a", "bytes"), ([1], "list")):
        for use in (agent.load, agent.save, load, Planner.from_checkpoint):
            with pytest.raises(InputError, match=f"fp: got {name}, allowed"):
                use(wrong)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"a state dict goes to TDMPC2\(cfg\)\.load"):
        load(agent.model.state_dict())  # type: ignore[arg-type]
    agent.save(tmp_path / "run" / "checkpoints" / "best")
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in ("checkpoints/best.json", "config.json"):
        with pytest.raises(CheckpointError, match=r"holds no weights, allowed: .*best\.safetensors"):
            load(tmp_path / "run" / name)
    for make in (load, Planner.from_checkpoint):
        with pytest.raises(ConfigError, match=r"'horizn'\. Did you mean 'horizon'"):
            make(tmp_path / "run", horizn=3)  # type: ignore[operator]
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

    monkeypatch.setattr(tdmpc2_fast.model.files.os, "replace", crash)
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

    monkeypatch.setattr(tdmpc2_fast.model.checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path / "a.pt")
    monkeypatch.undo()
    other.load(tmp_path / "a.pt")
    assert same(agent, other)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


def inside(state: dict[str, Any]) -> dict[str, Any]:
    """As of parts that were compiled, or wrapped for several GPUs, by themselves."""
    state = {k.replace("_encoder.", "_encoder._orig_mod."): v for k, v in state.items()}
    return {k.replace("_dynamics.", "_dynamics.module."): v for k, v in state.items()}


TRAINING = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [1]}, "step": 3}
WRAPPED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "compiled": (lambda s: prefixed("_orig_mod.", s), "the prefix '_orig_mod.'"),
    "all at once": (lambda s: prefixed("module._orig_mod.model.agent.", s), "'module._orig_mod.model.agent.'"),
    "parts": (inside, "'_orig_mod' inside names, 'module' inside names"),
    "nested": (
        lambda s: {"agent": {"state_dict": prefixed("module._orig_mod.model.", inside(s))}, **TRAINING},
        "['agent']['state_dict'] with the prefix 'module._orig_mod.model.', '_orig_mod' inside names",
    ),
    "in params": (lambda s: {"params": {"model": s}}, "['params']['model']"),
    "Lightning": (
        lambda s: {"state_dict": {**prefixed("agent.", s), "metric": torch.ones(2)}, "hyper_parameters": {"rho": 1}},
        "['state_dict'] with the prefix 'agent.'",
    ),
    "older generation": (lambda s: {"model_state_dict": prefixed("model.", old_generation(s))}, "['model_state_dict']"),
    "moments beside it": (lambda s: {"model": s, "exp_avg": {k: v for k, v in s.items() if "_target" not in k}}, ""),
    "arrays": (lambda s: {k: v.numpy() for k, v in tensors_only(s).items()}, ""),
    "float64": (lambda s: {k: v.double() for k, v in tensors_only(s).items()}, ""),
}


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_others_wrapped_around_a_model_is_taken_off(name: str, from_file: bool, tmp_path: Path) -> None:
    wrap, note = WRAPPED[name]
    agent, other = TDMPC2(tiny_config()), TDMPC2(tiny_config(seed=2))
    state: Any = wrap(agent.model.state_dict())
    if from_file:
        if name == "arrays":
            pytest.skip("arrays in a pickle are more than weights")
        torch.save(state, tmp_path / "wrapped.pt")
        state = tmp_path / "wrapped.pt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load(state)
    assert same(agent, other)
    assert len(caught) == bool(note)
    assert all(note in str(w.message) for w in caught)


@pytest.mark.parametrize("name", ["compiled", "nested"])
def test_info_and_its_like_see_through_wrappers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(WRAPPED[name][0](TDMPC2(tiny_config()).model.state_dict()), tmp_path / "a.pt")
    assert cli.main(["info", str(tmp_path / "a.pt")]) == 0
    out = capsys.readouterr().out
    assert "action_dim 2, latent_dim 16" in out
    assert WRAPPED[name][1] in " ".join(out.split())


@pytest.mark.parametrize(
    "change", [dict(num_bins=0), dict(vmin=-5), dict(vmax=5), dict(simnorm_dim=4), dict(log_std_max=1)], ids=str
)
def test_settings_that_give_weights_another_meaning_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    base: dict[str, Any] = dict(num_bins=1) if "num_bins" in change else {}
    TDMPC2(tiny_config(**base)).save(tmp_path / "a")
    ((key, value),) = change.items()
    was = getattr(tiny_config(**base), key)
    for use in (TDMPC2(tiny_config(**base | change)).load, lambda fp: load(fp, **change)):
        with pytest.raises(CheckpointError, match=f"{key} is {was} in it and {value} here; set {key}={was}$"):
            use(tmp_path / "a")
    load(tmp_path / "a", rho=0.7, horizon=2)


def test_bins_that_are_not_there_have_no_range(tmp_path: Path) -> None:
    TDMPC2(tiny_config(num_bins=0)).save(tmp_path / "a")
    TDMPC2(tiny_config(num_bins=0, vmin=-3)).load(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"set num_bins=1 or 0$"):
        TDMPC2(tiny_config()).load(of_another(num_bins=0))
    with pytest.raises(CheckpointError, match=r"set mlp_dim=32$"):
        TDMPC2(tiny_config(num_bins=1)).load(of_another(num_bins=0, mlp_dim=32))


def test_float8_weights_come_back_rounded() -> None:
    state = tensors_only(TDMPC2(tiny_config()).model.state_dict())
    other = TDMPC2(tiny_config(seed=2))
    other.load({k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in state.items()})
    assert torch.equal(other.model._pi[0].weight, state["_pi.0.weight"].to(torch.float8_e4m3fn).float())  # type: ignore[arg-type, union-attr]


def test_a_size_is_advised_where_it_helps_and_with_it_dims_that_are_given() -> None:
    def advice(**keys: Any) -> str:
        cfg = Config(device="cpu", **keys).with_env({"state": (5,)}, 2, 50)
        with pytest.raises(CheckpointError) as caught:
            TDMPC2(cfg).load(small)
        return str(caught.value).rpartition("; set ")[2]

    small = TDMPC2(Config(model_size=1, device="cpu").with_env({"state": (5,)}, 2, 50)).model.state_dict()
    assert advice() == "model_size=1"
    assert advice(model_size=1, mlp_dim=64) == "mlp_dim=384"
    assert advice(mlp_dim=64) == "model_size=1 mlp_dim=384"


def test_bfloat16_weights_come_back_rounded() -> None:
    agent, other = TDMPC2(tiny_config(log_std_min=-5.3)), TDMPC2(tiny_config(log_std_min=-5.3, seed=2))
    state = tensors_only(agent.model.state_dict())
    other.load({k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()})
    assert other.model.dtype == torch.float32
    weight, want = other.model._pi[0].weight, agent.model._pi[0].weight
    assert torch.equal(weight, want.bfloat16().float())  # type: ignore[operator, union-attr]


def of_another(**changes: Any) -> dict[str, Any]:
    return TDMPC2(tiny_config(**changes)).model.state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"model": s, "ema": s}, ["more than one model", "['model'] and ['ema']"]),
        (lambda s: {**s, "ema": prefixed("module.", s)}, ["the file itself and ['ema'] with the prefix 'module.'"]),
        (lambda s: {**s, **inside(s)}, ["under two names"]),
        (lambda s: {}, ["no TD-MPC2 model"]),
        (lambda s: {"model": [1], "a": 2, 3: 4}, ["no TD-MPC2 model"]),
        (lambda s: {k: v for k, v in s.items() if k.startswith("_encoder")}, ["no _dynamics.0.weight"]),
        (lambda s: {**s, "more": torch.ones(1)}, ["unknown more"]),
        (lambda s: {**s, "_pi.0.bias": torch.ones(24, dtype=torch.int8)}, ["_pi.0.bias is torch.int8"]),
        (
            lambda s: {**s, "_pi.0.bias": s["_pi.0.bias"] * torch.nan, "_reward.2.bias": s["_reward.2.bias"] / 0},
            ["2 of 62 tensors", "NaN or infinity", "_reward.2.bias, _pi.0.bias"],
        ),
        (lambda s: {**s, "_pi.0.bias": s["_pi.0.bias"].double() + 1e300}, ["infinity as torch.float32: _pi.0.bias"]),
        (lambda s: of_another(**MODEL_SIZES[1]), ["latent_dim is 128", "set model_size=1"]),
        (lambda s: of_another(num_q=4, num_bins=51), ["num_q is 4 in it and 3 here", "set num_q=4 num_bins=51"]),
        (lambda s: of_another(num_enc_layers=4), ["set num_enc_layers=4"]),
        (lambda s: of_another(episodic=True), ["set episodic=true"]),
        (lambda s: of_another(obs_dim=7, action_dim=3), ["observation is 7", "action_dim is 3", "the task it was"]),
        (lambda s: TDMPC2(tiny_multitask()).model.state_dict(), ["tasks is 3 in it and 0 here"]),
    ],
)
def test_what_does_not_fit_is_named_with_the_way_out(change: Callable[..., dict[Any, Any]], words: list[str]) -> None:
    agent = TDMPC2(tiny_config())
    before = copy.deepcopy(tensors_only(agent.model.state_dict()))
    with pytest.raises(CheckpointError) as caught:
        agent.load(change(agent.model.state_dict()))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in tensors_only(agent.model.state_dict()).items())


def test_pixels_are_told_from_states() -> None:
    pixels = Config(obs="rgb", latent_dim=64, mlp_dim=24, num_q=3, device="cpu").with_env({"rgb": (3, 64, 64)}, 2, 50)
    with pytest.raises(CheckpointError, match=r"obs is state in it and rgb here.*set latent_dim=16 .*obs=state"):
        TDMPC2(pixels).load(TDMPC2(tiny_config()).model.state_dict())


def test_weights_that_others_wrote_as_safetensors(tmp_path: Path) -> None:
    agent, other = TDMPC2(tiny_config()), TDMPC2(tiny_config(seed=2))
    tensors = {k: v.clone() for k, v in tensors_only(agent.model.state_dict()).items()}
    save_file(prefixed("model.", tensors), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"taken off.*'model\.'"):
        other.load(tmp_path / "a")
    assert same(agent, other)
    with pytest.raises(CheckpointError, match="carry no config"):
        load(tmp_path / "a")


def test_keys_of_another_machine_fall_back_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdmpc2_fast.runtime.backend.why_not", lambda device: "no GPU")
    agent = TDMPC2(tiny_config())
    keys = dict(device="cuda:7", backend="triton", precision="bfloat16", num_threads=4096, env_workers=4096)
    agent.model.cfg = agent.cfg.replace(**keys)
    agent.save(tmp_path / "checkpoints" / "best")  # the folder of a run is as good
    used = "used: device=cpu backend=auto precision=auto num_threads=none env_workers=none"
    for make in (load, Planner.from_checkpoint):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made: Any = make(tmp_path)
        assert [used in str(w.message) and "cuda:7 backend=triton" in str(w.message) for w in caught] == [True]
        assert made.act([1.0] * 5).shape == (2,) if make is load else made.plan([[1.0] * 5]).shape == (1, 2)
    given = dict(device="cpu", backend="torch", precision="float32", num_threads=2, env_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, **given).cfg.precision == "float32"
    for key, error in (("device", ConfigError), ("backend", BackendError), ("precision", BackendError)):
        with pytest.raises(error, match=key):
            load(tmp_path, **{key: keys[key]})


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    for make in (load, Planner.from_checkpoint, TDMPC2(tiny_config()).load):
        with pytest.raises(CheckpointError, match="without checkpoints/best"):
            make(tmp_path)


def test_keys_of_older_versions_are_left_out(tmp_path: Path) -> None:
    TDMPC2(tiny_config()).save(tmp_path / "model")
    (manifest,) = tmp_path.glob("*.json")
    kept = json.loads(manifest.read_text())
    kept["config"]["compile"] = True
    manifest.write_text(json.dumps(kept))
    assert load(tmp_path / "model").cfg == tiny_config()
