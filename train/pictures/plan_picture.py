"""A picture of one decision of the planner: what it tried, what it kept, and what it thought that worth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.errors import ConfigError, InputError
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.plan.trace import PlanTrace
from tdmpc2_fast.seeds import stream_seed

from ..envs.base import Array, Env, reset, state_of, step
from ..envs.multitask import Padded
from .frames import rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# apart for colour-blind eyes, too
_SAMPLES, _PRIOR, _ELITES, _MEAN, _CHOSEN = "#7a7a7a", "#e69f00", "#0072b2", "black", "#cc2d80"
_FRAME = "#b0b0b0"
_MOST_DIMS = 3
_WIDEST_HEADING = 100
_DECISION = 50


def draw_plan(
    agent: TDMPC2, env: Env, decision: int | None, out: str | Path, dims: Sequence[int] | None = None
) -> Path:
    """Play `decision` decisions of a new episode without exploration, then draw the plan for the next one.

    The agent's own planner is left alone; the environment is left at that decision. Where it
    cannot be drawn, the picture is made without it and a line says why.

    Args:
        agent: what plans.
        env: its environment; of a multi-task model that of one of its tasks, `envs.multitask.Padded`.
        decision: how many decisions come before the one drawn; None for 50 or, where the episode is
            shorter, all but its last, which a line then says.
        out: a name ending in `.png` or `.svg`.
        dims: action dims to show, from 0; default the first three.

    Raises:
        InputError: an episode that ends before `decision`; else as `plan_picture`.
    """
    _check_name(Path(out))
    planner = Planner(agent.model, 1, seed=stream_seed(agent.cfg.seed, "plan picture"))
    start, random = {name: x.clone() for name, x in planner.state().items()}, state_of(env)
    before = min(_DECISION, env.max_episode_steps - 1) if decision is None else decision
    obs, played = _play(planner, env, before)
    task, name, live = None, agent.cfg.task, None
    if isinstance(env, Padded):
        task, name, live = env.task, env.name, range(min(env.env.action_dim, _MOST_DIMS))
    while obs is None:
        if decision is not None:
            raise InputError(f"decision: got {decision}, allowed: below {played}, where the episode ended")
        before = played - 1  # of the same episode, once more
        planner.load_state(start)
        if random is not None:
            env.set_random_state(random)
        obs, played = _play(planner, env, before)
    if decision is None and before < _DECISION:
        print(f"note: the episode ends before decision {_DECISION}; decision {before} is drawn")
    frame = None
    try:
        frame = rgb(env.render())
    except Exception as e:  # drivers and other people's environments raise what they like
        print(f"note: the plan is drawn without its environment: {e}")
    return plan_picture(
        planner,
        torch.from_numpy(obs[None]),
        out,
        t0=before == 0,
        task=task,
        title=f"{name}, decision {before}",
        frame=frame,
        dims=live if dims is None else dims,
    )


def _play(planner: Planner, env: Env, count: int) -> tuple[Array | None, int]:
    """Play `count` decisions of a new episode; return the observation, None where it ended, and how many were made."""
    obs, task = reset(env), env.task if isinstance(env, Padded) else None
    for i in range(count):
        action = planner.plan(torch.from_numpy(obs[None]), t0=i == 0, eval_mode=True, task=task)
        found = step(env, action[0].cpu().numpy())
        if found.terminated or found.truncated:
            return None, i + 1
        obs = found.obs
    return obs, count


def plan_picture(
    planner: Planner,
    obs: Tensor,
    out: str | Path,
    t0: bool | Tensor = True,
    env_index: int = 0,
    task: int | Tensor | None = None,
    title: str = "one decision",
    frame: Any = None,
    dims: Sequence[int] | None = None,
) -> Path:
    """Draw what the planner does with `obs`, and leave it as it was.

    Args:
        planner: for E environments.
        obs: (E, *obs_shape), as `Planner.plan` takes it; so are `t0` and `task`.
        out: a name ending in `.png` or `.svg`; a file of this name is replaced.
        env_index: which of the E plans is drawn.
        title: what the picture is of.
        frame: a picture of the environment at this decision, in any form that `frames.rgb` takes.
        dims: action dims to show, from 0; default the first three.

    Raises:
        InputError: an argument of the wrong shape or value.
        ConfigError: matplotlib is missing.
    """
    out = Path(out)
    _check_name(out)
    figure = plan_figure(watch(planner, obs, t0, task), planner, env_index, title, frame, dims)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    return out


def watch(planner: Planner, obs: Tensor, t0: bool | Tensor = True, task: int | Tensor | None = None) -> PlanTrace:
    """Trace the plan that the next call with these arguments makes; the planner stays as it was."""
    trace, before = PlanTrace(), {name: x.clone() for name, x in planner.state().items()}
    try:
        planner.plan(obs, t0, eval_mode=True, task=task, trace=trace)
        planner._calls -= 1
        planner._times.pop()  # being watched takes longer
    finally:
        planner.load_state(before)
    return trace


def plan_figure(
    trace: PlanTrace,
    planner: Planner,
    env_index: int = 0,
    title: str = "one decision",
    frame: Any = None,
    dims: Sequence[int] | None = None,
) -> Figure:
    """Return the figure of a trace of `planner`; arguments are as for `plan_picture`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ConfigError("pictures of plans need matplotlib; pip install 'tdmpc2-fast[train]'") from e
    cfg = planner.cfg
    width = cfg.need("action_dim")
    if not 0 <= env_index < planner.num_envs:
        raise InputError(f"env_index: got {env_index}, allowed: 0 to {planner.num_envs - 1}")
    shown = list(range(min(width, _MOST_DIMS))) if dims is None else list(dims)
    if not shown or not all(0 <= a < width for a in shown):
        raise InputError(f"dims: got {shown}, allowed: some of 0 to {width - 1}")

    plan = _Plan(trace, env_index, cfg.num_pi_trajs)
    heights = (1.55 * len(shown) + 0.95 if len(shown) > 1 else 2.7, 3.3)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    heading = textwrap.fill(f"{title}: the chosen plan is worth {plan.worth:.2f}", _WIDEST_HEADING)
    figure = Figure(figsize=(12.4, sum(heights) + 0.5 + 0.2 * heading.count("\n")), layout=layout)
    figure.suptitle(heading, fontsize=12, fontweight="bold")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=heights))
    _draw_sequences(above, plan, shown, width)
    widths = [2.6, 1.6] if frame is None else [2.6, 1.6, 1]
    panels = below.subplots(1, len(widths), width_ratios=widths)
    _draw_values(panels[0], plan)
    _draw_spread(panels[1], plan, width, cfg.min_std)
    if frame is not None:
        panels[2].imshow(rgb(frame))
        panels[2].set(xticks=[], yticks=[])
        panels[2].spines[:].set_color(_FRAME)  # many environments are drawn on white
        panels[2].set_title("the environment", fontsize=9)
    return figure


class _Plan:
    """One environment's part of a trace, as arrays: I iterations, H steps, N sequences, P of them the policy's."""

    def __init__(self, trace: PlanTrace, e: int, p: int) -> None:
        def of(entries: list[Tensor]) -> Any:
            return torch.stack([x[e] for x in entries]).float().cpu().numpy()

        self.actions, self.values = of(trace.actions), of(trace.values)  # (I, H, N, A), (I, N)
        self.elites = of(trace.elites).astype(int)  # (I, K)
        self.means, self.stds = of(trace.means), of(trace.stds)  # (I, H, A)
        self.chosen = of(trace.chosen)[0]  # (H, A)
        self.priors = p
        best = self.elites[-1, int(of(trace.picked)[0])]
        self.worth = float(self.values[-1, best])
        self.iterations = range(len(self.values))


def _draw_sequences(figure: Any, plan: _Plan, shown: list[int], width: int) -> None:
    """Draw actions over the steps of the plan: a column per iteration, a row per action dim."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    horizon, count = plan.actions.shape[1:3]
    axes = figure.subplots(len(shown), len(plan.iterations), sharex=True, sharey=True, squeeze=False)
    for row, a in enumerate(shown):
        for i in plan.iterations:
            ax, actions = axes[row, i], plan.actions[i, :, :, a]
            kinds = [
                (actions[:, plan.priors :], _SAMPLES, float(np.clip(45 / count, 0.05, 0.5)), 0.7),
                (actions[:, : plan.priors], _PRIOR, 0.7, 0.9),
                (actions[:, plan.elites[i]], _ELITES, float(np.clip(16 / plan.elites.shape[1], 0.12, 0.8)), 0.9),
            ]
            for sequences, color, alpha, thick in kinds:
                # rasterized: thousands of lines make an SVG of many megabytes
                look: Any = dict(colors=color, alpha=alpha, linewidths=thick, rasterized=True)
                ax.add_collection(LineCollection(list(_paths(sequences)), **look))
            (mean,), (std,) = _paths(plan.means[i, :, a : a + 1]), _paths(plan.stds[i, :, a : a + 1])
            low, high = (np.clip(mean[:, 1] + sign * std[:, 1], -1, 1) for sign in (-1, 1))  # as samples are
            ax.fill_between(mean[:, 0], low, high, color=_MEAN, alpha=0.13, lw=0)
            ax.plot(*mean.T, color=_MEAN, linewidth=1.6)
            if i == plan.iterations[-1]:
                ax.plot(range(1, horizon + 1), plan.chosen[:, a], "o-", color=_CHOSEN, linewidth=1.6, markersize=4)
            ax.set(ylim=(-1.08, 1.08), yticks=(-1, 0, 1), xticks=range(1, horizon + 1))
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
            if row == 0:
                ax.set_title(f"iteration {i + 1}", fontsize=9)
        axes[row, 0].set_ylabel("action" if width == 1 else f"action {a + 1} of {width}", fontsize=9)
    figure.supxlabel("step of the plan", fontsize=9)
    labels = [
        (f"{count - plan.priors} samples", _SAMPLES),
        (f"{plan.priors} sequences of the policy", _PRIOR),
        (f"{plan.elites.shape[1]} elites", _ELITES),
        ("mean ± std that comes of them", _MEAN),
        ("chosen", _CHOSEN),
    ]
    handles = [Line2D([], [], color=c, linewidth=2.5, label=text) for text, c in labels if text[:2] != "0 "]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)


def _draw_values(ax: Any, plan: _Plan) -> None:
    """Draw how the values of all sequences, of the elites and of the policy's go from iteration to iteration."""
    x = [i + 1 for i in plan.iterations]
    elites = np.take_along_axis(plan.values, plan.elites, 1)
    for values, color, name in ((plan.values, _SAMPLES, "all"), (elites, _ELITES, "elites")):
        low, lower, middle, upper, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        ax.fill_between(x, lower, upper, color=color, alpha=0.3, lw=0)
        ax.plot(x, middle, "o-", color=color, markersize=3, label=name)
    if plan.priors:
        middle = np.median(plan.values[:, : plan.priors], 1)
        ax.plot(x, middle, "s--", color=_PRIOR, markersize=3, label="the policy's")
    ax.plot(x[-1:], [plan.worth], "o", color=_CHOSEN, markersize=6, label="chosen", clip_on=False, zorder=5)
    ax.set_title("values: median, middle 50% and 90%", fontsize=9)
    _label(ax, x, "estimated return")


def _draw_spread(ax: Any, plan: _Plan, width: int, min_std: float) -> None:
    """Draw how the std that samples are drawn with shrinks, for each step of the plan."""
    from matplotlib import colormaps

    x = [i + 1 for i in plan.iterations]
    horizon = plan.stds.shape[1]
    for t, color in enumerate(colormaps["viridis"](np.linspace(0.1, 0.85, horizon))):
        ax.plot(x, plan.stds[:, t].mean(-1), "o-", color=color, markersize=3, label=f"step {t + 1}")
    ax.axhline(min_std, color=_SAMPLES, linewidth=1, linestyle=":", label="min_std")
    ax.set_ylim(bottom=0)
    ax.set_title("std of the actions" + (f", mean of all {width}" if width > 1 else ""), fontsize=9)
    _label(ax, x, "std")


def _label(ax: Any, x: list[int], y: str) -> None:
    ax.set_xticks(x)
    ax.set_xlabel("iteration", fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5)  # beside no data
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _paths(sequences: NDArray[Any]) -> NDArray[Any]:
    """Return lines (n, H, 2) through the actions of sequences (H, n); a plan of one step becomes a dash."""
    steps = np.arange(1.0, len(sequences) + 1)
    if len(sequences) == 1:
        steps, sequences = np.array([0.8, 1.2]), np.repeat(sequences, 2, 0)
    return np.stack(np.broadcast_arrays(steps, sequences.T), -1)


def _check_name(out: Path) -> None:
    if out.suffix not in (".png", ".svg"):
        raise InputError(f"out: got {str(out)!r}, allowed: a name ending in '.png' or '.svg'")
