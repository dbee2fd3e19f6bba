"""The picture of a plan: it shows what the planner did, and the planner does not notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted_env
import torch
from conftest import tiny_config, tiny_multitask

from tdmpc2_fast import TDMPC2, Planner
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.pictures.plan_picture import draw_plan, plan_figure, plan_picture, watch

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg

Liven = Callable[[TDMPC2], TDMPC2]


def panels(figure: Any) -> tuple[list[Any], list[Any]]:
    """The axes of the sequences, row by row, and those below them."""
    above, below = figure.subfigs
    return above.axes, below.axes


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_picture_is_of_the_plan_that_comes_next_and_changes_no_number(
    livened: Liven, tmp_path: Path, backend: str
) -> None:
    small = dict(latent_dim=8, mlp_dim=16, num_samples=12, num_elites=4, num_pi_trajs=2, iterations=1, horizon=2)
    agent = livened(TDMPC2(tiny_config(**small, backend=backend, precision="float32")))
    drawn, plain = Planner(agent.model, 2), Planner(agent.model, 2)
    assert drawn.backend.name == backend
    for t in range(2):
        obs, t0, evaluate = torch.randn(2, 5), t == 0, torch.tensor([True, False])
        plan_picture(drawn, obs, tmp_path / "a.png", t0=t0, env_index=1)
        trace = watch(drawn, obs, t0)
        action = drawn.plan(obs, t0, evaluate)
        assert torch.equal(action, plain.plan(obs, t0, evaluate))
        assert torch.equal(action[0], trace.chosen[0][0, 0])
        assert torch.equal(drawn.prev_mean, plain.prev_mean)
        assert drawn.stats().calls == plain.stats().calls == t + 1


@pytest.mark.parametrize("env_index", [0, 2])
def test_the_picture_is_the_trace(livened: Liven, env_index: int) -> None:
    cfg = tiny_config(action_dim=4)
    agent = livened(TDMPC2(cfg))
    planner = Planner(agent.model, 3)
    trace = watch(planner, torch.randn(3, 5))
    dims = [3, 1]
    above, below = panels(plan_figure(trace, planner, env_index, dims=dims))
    count, p = cfg.effective_iterations, cfg.num_pi_trajs
    assert len(above) == len(dims) * count
    for row, a in enumerate(dims):
        for i in range(count):
            ax, actions = above[row * count + i], trace.actions[i][env_index, :, :, a]  # (H, N)
            wanted = [actions[:, p:], actions[:, :p], actions[:, trace.elites[i][env_index]]]
            for drawn, sequences in zip(ax.collections, wanted, strict=False):
                got = np.stack([s[:, 1] for s in drawn.get_segments()], 1)
                np.testing.assert_allclose(got, sequences.numpy())
            np.testing.assert_allclose(ax.lines[0].get_ydata(), trace.means[i][env_index, :, a])
            assert ax.get_ylabel() == (f"action {a + 1} of 4" if i == 0 else "")
        chosen = above[row * count + count - 1].lines[1].get_ydata()
        np.testing.assert_allclose(chosen, trace.chosen[0][env_index, :, a])
    values, stds = below
    everything, elites, prior, best = (line.get_ydata() for line in values.lines)
    for i in range(count):
        v = trace.values[i][env_index]
        assert everything[i] == pytest.approx(np.median(v))
        assert elites[i] == pytest.approx(np.median(v[trace.elites[i][env_index]]))
        assert prior[i] == pytest.approx(np.median(v[:p]))
    actions, elite = trace.actions[-1][env_index], trace.elites[-1][env_index][trace.picked[0][env_index]]
    assert torch.equal(actions[:, elite], trace.chosen[0][env_index])
    assert best[0] == pytest.approx(float(trace.values[-1][env_index, elite]))
    for t in range(cfg.horizon):
        wanted_std = [float(s[env_index, t].mean()) for s in trace.stds]
        np.testing.assert_allclose(stds.lines[t].get_ydata(), wanted_std, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(action_dim=1),
        dict(action_dim=21),
        dict(num_pi_trajs=0),
        dict(num_pi_trajs=32),
        dict(horizon=1),
        dict(horizon=7),
        dict(episodic=True),
    ],
)
def test_every_kind_of_plan_can_be_drawn(livened: Liven, tmp_path: Path, changes: dict[str, Any]) -> None:
    agent = livened(TDMPC2(tiny_config(**{"iterations": 2, **changes})))
    out = plan_picture(agent.planner, torch.randn(1, 5), tmp_path / "new" / "plan.png", title="a plan")
    from PIL import Image

    assert out.exists()
    assert np.asarray(Image.open(out)).std() > 1


def test_a_task_of_several_and_an_svg(livened: Liven, tmp_path: Path) -> None:
    agent = livened(TDMPC2(tiny_multitask(iterations=2)))
    out = plan_picture(agent.planner, torch.randn(1, 5), tmp_path / "plan.svg", task=1)
    assert "<svg" in out.read_text()
    assert out.stat().st_size < 2_000_000  # lines are not written one by one


class Played(scripted_env.Scripted):
    """Notes what was done to it; its pictures have one colour, or cannot be had."""

    def __init__(self, seed: int, error: Exception | None = None) -> None:
        super().__init__(seed)
        self.done: list[Any] = []
        self.error = error

    def step(self, action: Any) -> Any:
        self.done.append(np.array(action))
        return super().step(np.clip(action, 0.01, 0.02))  # never an action that breaks it

    def render(self, width: int = 384, height: int = 384) -> Any:
        if self.error is not None:
            raise self.error
        return np.full((height, width, 3), (10, 200, 30), np.uint8)


def of_scripted() -> TDMPC2:
    return TDMPC2(tiny_config(obs_dim=4, episode_length=5, iterations=2))


def test_an_agent_plays_up_to_the_decision_drawn(livened: Liven, tmp_path: Path) -> None:
    agent, env = livened(of_scripted()), Played(1)
    before = [agent.planner.prev_mean.clone(), agent.planner.generator.get_state()]
    out = draw_plan(agent, env, 3, tmp_path / "plan.png")
    assert len(env.done) == 3
    assert torch.equal(before[0], agent.planner.prev_mean)
    assert torch.equal(before[1], agent.planner.generator.get_state())
    from PIL import Image

    picture = np.asarray(Image.open(out).convert("RGB"))
    assert (picture == (10, 200, 30)).all(-1).sum() > 10_000
    again = Played(1)
    draw_plan(agent, again, 3, tmp_path / "again.png")
    np.testing.assert_array_equal(env.done, again.done)


@pytest.mark.parametrize("length", [1, 4, 5])
def test_of_a_shorter_episode_the_last_decision_is_drawn(
    livened: Liven, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int
) -> None:
    """Also where it is a termination that nobody knew of: the same episode is played again, up to there."""

    class Ends(Played):
        def step(self, action: Any) -> Any:
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, self._decisions == length, truncated, info

    agent, env, given = livened(of_scripted()), Ends(1), Ends(1)
    draw_plan(agent, env, None, tmp_path / "plan.png")
    assert f"note: the episode ends before decision 50; decision {length - 1} is drawn" in capsys.readouterr().out
    draw_plan(agent, given, length - 1, tmp_path / "given.png")
    assert capsys.readouterr().out == ""
    assert env._decisions == length - 1
    assert len(env.done) >= len(given.done) == length - 1
    assert len(given.done) == 0 or np.array_equal(env.done[-len(given.done) :], given.done)
    assert (tmp_path / "plan.png").read_bytes() == (tmp_path / "given.png").read_bytes()


@pytest.mark.parametrize("error", [RenderError("no pictures: paint is missing"), ZeroDivisionError("paint")])
def test_without_a_renderer_the_plan_is_still_drawn(
    livened: Liven, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert draw_plan(livened(of_scripted()), Played(1, error), 0, tmp_path / "plan.png").exists()
    assert f"drawn without its environment: {error}" in capsys.readouterr().out


def test_a_white_environment_has_a_frame_and_a_long_title_is_whole(agent: TDMPC2) -> None:
    trace = watch(agent.planner, torch.randn(1, 5))
    white = np.ones((100, 400))  # grey, from 0 to 1
    figure = plan_figure(trace, agent.planner, title="a task of a very long name, " * 8 + "decision 7", frame=white)
    shown = panels(figure)[1][2]
    assert shown.axison
    assert all(spine.get_visible() for spine in shown.spines.values())
    assert len(shown.get_xticks()) == len(shown.get_yticks()) == 0
    assert (shown.images[0].get_array() == 255).all()
    FigureCanvasAgg(figure).draw()
    assert "decision 7: the chosen plan" in " ".join(figure.get_suptitle().split())
    box, (width, height) = figure._suptitle.get_window_extent(), figure.canvas.get_width_height()
    assert 0 < box.x0 < box.x1 < width
    assert 0 < box.y0 < box.y1 < height


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(out="plan.jpg"), "out.*jpg.*png.*svg"),
        (dict(env_index=1), "env_index: got 1, allowed: 0 to 0"),
        (dict(dims=[2]), r"dims: got \[2\], allowed: some of 0 to 1"),
        (dict(dims=[]), "dims"),
    ],
)
def test_wrong_arguments_are_named(agent: TDMPC2, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    out = tmp_path / changes.pop("out", "plan.png")
    with pytest.raises(InputError, match=words):
        plan_picture(agent.planner, torch.randn(1, 5), out, **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_episode_that_ends_too_early_and_a_missing_package(
    agent: TDMPC2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="decision: got 9, allowed: below"):
        draw_plan(of_scripted(), Played(1), 9, tmp_path / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib.*tdmpc2-fast\[train\]"):
        plan_picture(agent.planner, torch.randn(1, 5), tmp_path / "plan.png")
