"""Files and agents on the Hugging Face Hub, by a stand-in on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_multitask
from hub_server import TOKEN, StandIn, stand_in

from tdmpc2_fast import TDMPC2, Planner, load, pull, push
from tdmpc2_fast.compat.hub import card
from tdmpc2_fast.compat.hub_files import Address, address, fetch
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import CheckpointError, ConfigError, InputError
from tdmpc2_fast.train import cli

pytest.importorskip("huggingface_hub")


def forget_the_client() -> None:
    """Its settings are read when it is imported."""
    for name in [n for n in sys.modules if n.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as server:
        settings = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1")
        settings |= dict(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="*", no_proxy="*")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        forget_the_client()
        yield server
    forget_the_client()


def same(a: TDMPC2, b: TDMPC2) -> bool:
    x, y = (tensors_only(agent.model.state_dict()) for agent in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def saved(agent: TDMPC2, path: Path) -> bytes:
    agent.save(path)
    return path.read_bytes()


def test_addresses() -> None:
    assert address("hf://a/b") == address("hf://a/b/") == Address("a/b", None, "")
    assert address("hf://a/b/c/d.pt") == address(Path("hf://a/b/c/d.pt")) == Address("a/b", None, "c/d.pt")
    assert address("hf://a/b@v1/d.pt") == address("hf://a/b/d.pt@v1") == Address("a/b", "v1", "d.pt")
    assert address("hf://a/b@refs%2Fpr%2F1") == Address("a/b", "refs/pr/1", "")
    assert str(Address("a/b", "refs/pr/1", "c")) == "hf://a/b@refs%2Fpr%2F1/c"
    for wrong in ("hf://a", "hf://", "hf://a/b@1/c@2"):
        with pytest.raises(CheckpointError, match=r"no address on the Hub, allowed: hf://OWNER/NAME"):
            load(wrong)


def test_a_file_is_loaded_by_its_address_everywhere(
    hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = TDMPC2(tiny_config())
    hub.repos["a/b"] = {"runs/x.safetensors": saved(agent, tmp_path / "x.safetensors"), "README.md": b""}
    hub.repos["a/b"]["official.pt"] = saved(agent, tmp_path / "x.pt")
    where = "hf://a/b/runs/x.safetensors"
    assert same(load(where), agent)
    assert same(load("hf://a/b@v1"), agent)  # its only safetensors
    other = TDMPC2(tiny_config(seed=2))
    other.load(where)
    assert same(other, agent)
    official = Planner.from_checkpoint("hf://a/b/official.pt", task="mine", episode_length=50)
    assert official.plan([[1.0] * 5]).shape == (1, 2)
    assert cli.main(["info", where]) == 0
    assert f"{agent.model.total_params:,} learnable" in capsys.readouterr().out
    count = len([a for a in hub.asked if a.endswith("x.safetensors")])
    load(where)
    assert len([a for a in hub.asked if a.endswith("x.safetensors")]) == count + 1  # asked whether it has changed


def test_commands_take_it_and_a_picture_of_it_lies_in_the_folder_one_is_in(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dm_control")
    cfg = tiny_config(5, 1, 500, task="cartpole-swingup", horizon=2, iterations=1)
    hub.repos["a/b"] = {"model.safetensors": saved(TDMPC2(cfg), tmp_path / "m.safetensors")}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["plan", "hf://a/b", "decision=1"]) == 0
    assert [p.name for p in Path().iterdir()] == ["model-plan.png"]
    keys = ["eval_episodes=1", "num_samples=8", "num_elites=4", "num_pi_trajs=2"]
    assert cli.main(["eval", "checkpoint=hf://a/b", *keys]) == 0


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["best.safetensors", "model.safetensors", "a.pt"], "model.safetensors"),
        (["checkpoints/latest.safetensors", "checkpoints/best.safetensors"], "checkpoints/best.safetensors"),
        (["a.safetensors", "a.pt", "b.pt"], "a.safetensors"),
        (["a.json", "dog-1.pt"], "dog-1.pt"),
    ],
)
def test_the_file_that_stands_for_a_repository(hub: StandIn, names: list[str], file: str) -> None:
    hub.repos["a/b"] = {name: name.encode() for name in names}
    assert fetch("hf://a/b").read_text() == file


def test_what_cannot_be_had_is_answered_in_a_line_that_says_what_to_do(hub: StandIn) -> None:
    hub.repos |= {"a/b": {"x.pt": b"x", "y.pt": b"y"}, "a/empty": {}, "a/gated": {"x.pt": b""}, "a/own": {"x.pt": b"x"}}
    hub.gated.add("a/gated")
    hub.private.add("a/own")
    for where, words in {
        "hf://a/b/z.pt": "no such file in a/b; hf://a/b alone",
        "hf://a/b": "allowed: one of its files: x.pt, y.pt",
        "hf://a/empty": "allowed: a repository with weights",
        "hf://a/b@v9/x.pt": "no such revision",
        "hf://a/none/x.pt": "no repository a/none, or a private one: check the name, or log in by `hf auth login`",
        "hf://a/none": "no repository a/none",
        "hf://a/own/x.pt": "or a private one",
        "hf://a/gated/x.pt": "is gated: ask for access",
        "hf://a/b--c/x.pt": "HFValidationError",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            load(where)
        assert words in str(caught.value), where
        assert str(caught.value).startswith(f"checkpoint '{where}': ")
        assert "\n" not in str(caught.value)
    assert fetch("hf://a/own/x.pt", token=TOKEN).read_bytes() == b"x"


def test_without_a_network_the_cache_serves(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = TDMPC2(tiny_config())
    hub.repos["a/b"] = {"x.safetensors": saved(agent, tmp_path / "x.safetensors")}
    load("hf://a/b/x.safetensors")
    hub.shutdown()
    hub.server_close()
    forget_the_client()  # and with it connections that are open
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again
    assert same(load("hf://a/b/x.safetensors"), agent)
    for where in ("hf://a/b/y.safetensors", "hf://a/b"):
        with pytest.raises(CheckpointError, match=r"cannot be reached.*check the network"):
            load(where)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    agent = TDMPC2(tiny_config())
    for use in (lambda: load("hf://a/b"), lambda: push(agent, "a/b"), lambda: pull("a/b")):
        with pytest.raises(CheckpointError, match=r"needs huggingface_hub; pip install 'tdmpc2-fast\[hub\]'"):
            use()
    with pytest.raises(InputError, match=r"push\(agent, 'OWNER/NAME'\)"):
        agent.save("hf://a/b")


@pytest.mark.parametrize("make", [tiny_config, tiny_multitask], ids=["one task", "several"])
def test_an_agent_is_pushed_and_pulled(hub: StandIn, make: type, tmp_path: Path) -> None:
    agent = TDMPC2(make(horizon=2))
    agent.cfg = agent.model.cfg = agent.cfg.replace(work_dir="/home/someone/runs", wandb_entity="someone")
    url = push(agent, "a/new", token=TOKEN)
    assert "/a/new/" in url
    files = hub.repos["a/new"]
    assert {*files} == {"README.md", "config.json", "model.json", "model.safetensors"}
    assert json.loads(files["config.json"])["horizon"] == 2
    assert not [name for name, blob in files.items() if b"someone" in blob]
    for again in (pull("a/new", token=TOKEN), load("hf://a/new")):
        assert same(again, agent)
        assert again.cfg == agent.cfg.replace(work_dir=None, wandb_entity=None)
    assert pull("a/new", revision="v1", seed=7).cfg.seed == 7
    for name, blob in files.items():
        (tmp_path / name).write_bytes(blob)
    assert same(pull(str(tmp_path)), agent)
    with pytest.raises(ConfigError, match="'horizn'"):
        pull("a/new", horizn=1)


def test_what_is_pulled_is_read_as_safely(hub: StandIn, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    hub.repos["a/b"] = {"pytorch_model.pt": (tmp_path / "module.pt").read_bytes()}
    for use in (lambda: pull("a/b"), lambda: load("hf://a/b")):
        with pytest.raises(CheckpointError, match=r"a pickled module.*refused"):
            use()


def test_push_and_pull_say_what_is_not_allowed(hub: StandIn) -> None:
    agent = TDMPC2(tiny_config())
    with pytest.raises(CheckpointError, match=r"push to 'a/b': .*log in by `hf auth login`"):
        push(agent, "a/b")
    with pytest.raises(CheckpointError, match="no repository a/none"):
        pull("a/none")
    assert not hub.repos


def test_the_card_tells_the_config() -> None:
    text = card(tiny_multitask())
    assert "| `tasks` | `a`, `b`, `c` |" in text
    assert "| `latent_dim` | `16` |" in text
    assert text.startswith("---\nlibrary_name: tdmpc2-fast\n")
