"""The commands that only tell: tasks and info."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
    words,
)
from conftest import TINY, tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import CRITICS, TARGETS, tensors_only

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train import cli
from tdmpc2_fast.train.envs import SUITES
from tdmpc2_fast.train.envs.catalogue import lacks


class TestTasks:
    def test_tasks(self, capsys: Capture) -> None:
        assert cli.main(["tasks"]) == 0
        names = capsys.readouterr().out.split()
        assert {"dog-run", "Hopper-v5", "mw-reach", "mt30", "bipedal-walker"} <= set(names)
        assert cli.main(["tasks", "HUM"]) == 0
        out = capsys.readouterr().out
        assert "humanoid-run" in out
        assert "dog-run" not in out
        assert "Humanoid-v5" in out
        assert "Humanoid-v3" not in out
        assert cli.main(["tasks", "pend"]) == 0
        assert "Pendulum-v1" in capsys.readouterr().out.split()

    def test_every_gymnasium_task_listed_can_be_made_and_none_is_left_out(self) -> None:
        gymnasium = pytest.importorskip("gymnasium")
        # Other tests register environments of their own; those in JAX, which may be here, are left out on purpose.
        theirs = {
            s.id: str(s.entry_point)
            for s in gymnasium.registry.values()
            if "gymnasium.envs" in str(s.entry_point)
            and not any(x in str(s.entry_point) for x in ("phys2d", "tabular"))
        }
        listed = {*SUITES["Gymnasium"].names} & {*theirs}
        made = {}
        for name in {*listed, *(name for name, entry in theirs.items() if "mujoco" not in entry)}:
            with (
                suppress(gymnasium.error.Error, ImportError),
                warnings.catch_warnings(),
            ):  # a package that is not here, an old id
                warnings.simplefilter("ignore")
                env = gymnasium.make(name)
                made[name] = isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.is_bounded()
                env.close()
        assert {name for name, fits in made.items() if fits} == listed & {*made}
        missing = listed - {*made}
        assert len(listed) - len(missing) >= 13
        assert missing <= {name for name in listed if lacks(name)}

    def test_what_a_task_lacks_is_said_alike_everywhere(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "Box2D", None)
        for name in ("bipedal-walker", "BipedalWalkerHardcore-v3", "lunarlander-continuous", "CarRacing-v3"):
            assert cli.main(["tasks", name.lower()]) == 0
            need = capsys.readouterr().out.partition(": ")[2].partition("\n")[0]
            assert need == "needs pip install 'tdmpc2-fast[box2d]'"
            assert cli.main(["train", *words(task=name)]) == 2
            assert capsys.readouterr().err == f"error: config key 'task': {name!r} {need}\n"

    def test_tasks_say_what_to_install(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert cli.main(["tasks"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "DMControl (39): needs pip install 'tdmpc2-fast[train]'" in out
        assert "Gymnasium (" in out
        assert "Meta-World (50): needs an interpreter of its own: tdmpc2-fast suites install metaworld" in out
        assert "Sets of tasks (2): one model each, where all of its tasks run mt30 mt80" in out


class TestInfo:
    @pytest.mark.parametrize("ending", ["", ".pt"])
    @pytest.mark.parametrize("make", [tiny_config, tiny_multitask], ids=["one task", "several"])
    def test_info(self, make: Callable[..., Config], ending: str, empty_folder: Path, capsys: Capture) -> None:
        agent = TDMPC2(make(horizon=4))
        agent.save(empty_folder / f"a{ending}")
        assert cli.main(["info", f"a{ending}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{agent.model.total_params:,} learnable" in out
        dims = agent.cfg
        assert f"observation 5, action_dim {dims.action_dim}, latent_dim 16, mlp_dim 24, num_q 3" in out
        assert ("tasks 3, task_dim 4" in out) == dims.multitask
        assert ("horizon=4" in out) == (ending == "")
        assert "rho=" not in out
        assert ("current generation" in out) == (ending == ".pt")

    def test_info_of_the_older_generation(self, empty_folder: Path, capsys: Capture) -> None:
        state = tensors_only(TDMPC2(tiny_config()).model.state_dict())
        leaves = ("weight", "bias", "ln.weight", "ln.bias")
        for new, old in ((CRITICS, "_Qs.params."), (TARGETS, "_target_Qs.params.")):
            for key in [k for k in state if k.startswith(new)]:
                layer, leaf = key.removeprefix(new).split(".", 1)
                state[f"{old}{4 * int(layer) + leaves.index(leaf)}"] = state.pop(key)
        torch.save({"model": state}, "a.pt")
        assert cli.main(["info", "a.pt"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "older generation" in out
        assert f"{TDMPC2(tiny_config()).model.total_params:,} learnable" in out

    def test_info_of_pixels(self, empty_folder: Path, capsys: Capture) -> None:
        cfg = Config.from_dict(TINY | dict(obs="rgb", num_channels=4, latent_dim=64, device="cpu"))
        TDMPC2(cfg.with_env({"rgb": (9, 64, 64)}, 2, 50)).save(empty_folder / "a")
        assert cli.main(["info", "a"]) == 0
        assert "rgb channels 9" in capsys.readouterr().out
