"""Episodes for a data set: played with random actions or by trained agents, or taken from a run's replay.

Episodes are appended as they come, some at a time: stopped at any point, the set is whole and holds what was done. Each
shard tells its origin and the settings it was played with, so the same command, and no other, goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tdmpc2_fast.agent import TDMPC2, load
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, DataError, warn
from tdmpc2_fast.learn.replay import ReplayBuffer
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.plan.planner import Planner
from tdmpc2_fast.seeds import stream_seed
from tdmpc2_fast.task_sets import TASK_SETS

from ..envs import make_env, same_form, suite_of, tried
from ..envs.base import Actions, Env, check_actions, close_all, reset, step
from ..run.checkpoints import Checkpoints, Saved
from ..run.episode import Episode
from ..run.stop import Stop
from ..run.threads import choose_threads
from .dataset import found_index
from .index import INDEX, Index
from .rows import Kept, kept
from .writer import check_place, place, shortened, write

EPISODES = 100
_MOST_ENVS = 16
_APPEND_SECONDS, _APPEND_BYTES = 60.0, 64 << 20
_LOOK_SECONDS = 0.05
_LONGEST_SETTINGS = 200
_SILENT = ("seed", "device", "num_threads", "backend", "precision")
"""Keys that are told elsewhere, or change no more than rounding."""
_OF_ALL = (*_SILENT, "obs", "episode_length", "env_kwargs")
_OF_AGENTS = (
    *("task", "multitask", "tasks", "episodic", "model_size", "action_dims", "episode_lengths", "task_dim"),
    *("mpc", "iterations", "num_samples", "num_elites", "num_pi_trajs", "horizon", "min_std", "max_std", "temperature"),
    *("log_std_min", "log_std_max", "discount_denom", "discount_min", "discount_max"),
)
"""Keys that change how agents play, or that a file without a config needs."""
_NONE: dict[str, Any] = dict(
    multitask=False,
    tasks=(),
    action_dims=(),
    episode_lengths=(),
    task_dim=0,
    obs_shape=None,
    action_dim=None,
    episode_length=None,
    seed_steps=None,
)
"""What a config has of a multi-task model, as one of a single task has it."""

Tell = Callable[[str], None]
Act = Callable[[NDArray[np.float32], bool], Actions]
"""Observations (E, *obs_shape), and whether episodes begin, to actions (E, A)."""


class Player(NamedTuple):
    """Who plays a task, in how many environments at most.

    origin: in a line, who it is; policy: what makes it act with the random numbers of a seed.
    """

    origin: str
    cfg: Config
    width: int
    policy: Callable[[int], Act]
    form: Config | None = None  # the agent's, where its observations must fit


def collect(
    sources: Sequence[str],
    out: Path,
    values: dict[str, Any],
    episodes: int | None = None,
    noise: bool = False,
    replay: bool = False,
    stop: Stop | None = None,
    tell: Tell = lambda line: None,
) -> None:
    """Append episodes to a data set, which is made if it is not there.

    Args:
        sources: each a task's name, for random actions; a checkpoint; or a run's folder, for all of its checkpoints.
        out: the data set's folder.
        values: config keys: `seed`, `device`, settings of the environment and, of agents, of planning.
        episodes: how many of each source the set is to have, of each task; default 100, or all of a replay.
        noise: let agents explore as in training.
        replay: take the episodes that a run's replay holds, and play none.
        stop: asked after every decision.
        tell: told in a line of each append.

    Raises:
        ConfigError, CheckpointError, DataError: what was asked for cannot be; nothing was written.
        Stopped: `stop` said so; what was done is in the set.
    """
    stop = stop or Stop()
    _check_keys(sources, values, noise, replay)
    check_place(out)
    if replay:
        for run in [_replay(Path(source).expanduser()) for source in sources]:
            _from_replay(run, out, episodes, tell)
        return
    plan: list[tuple[Player, int]] = []
    total = EPISODES if episodes is None else episodes
    for source in sources:
        players = [*_players(source, values, noise)]
        for task in dict.fromkeys(p.cfg.task for p in players):
            sharing = [p for p in players if p.cfg.task == task]
            plan += [(p, total // len(sharing) + (i < total % len(sharing))) for i, p in enumerate(sharing[:total])]
    for player, _ in plan:  # what cannot be is said before the first plays for an hour
        _try(player, out)
    with place(out):
        for player, count in plan:
            _play(player, out, count, stop, tell)


def _check_keys(sources: Sequence[str], values: dict[str, Any], noise: bool, replay: bool) -> None:
    """Raise a `ConfigError` for a key that would change nothing."""
    agents = any(map(_is_path, sources))
    allowed = () if replay else _OF_ALL + (_OF_AGENTS if agents else ())
    given = values | ({"noise": True} if noise and (replay or not agents) else {})
    for key in given:
        if key not in allowed:
            who = "a replay, which is taken as it is" if replay else "agents" if agents else "random actions"
            hint = f": none, SOURCE says it ({' '.join(sources)})" if key == "task" and not replay else ""
            raise ConfigError(
                f"config key {key!r}: got {given[key]!r}, which changes nothing for {who}, allowed"
                + (hint or f": {', '.join(allowed) or 'none'}")
            )


def _is_path(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or path.with_name(f"{path.name}.safetensors").exists()


def _try(player: Player, out: Path) -> None:
    """Raise an error where the environment cannot be made, or does not fit to the agent or into the set."""
    env = make_env(player.cfg, player.cfg.seed)
    try:
        if player.form is not None:
            same_form(env, player.form)
        got = (env.obs_shape[0], env.action_dim)
    finally:
        close_all([env])
    held = found_index(out).tasks if (out / INDEX).exists() else ()
    for task in held:
        if task.name == player.cfg.task and (task.obs_dim, task.action_dim) != got:
            raise DataError(
                f"data {str(out)!r}: has {task.name!r} with observations and actions of {task.obs_dim} and "
                f"{task.action_dim} numbers, allowed: {got[0]} and {got[1]}, as they are here"
            )


def _play(player: Player, out: Path, count: int, stop: Stop, tell: Tell) -> None:
    """Play until the set has so many episodes of this player."""
    task = player.cfg.task
    done = written = _there(out, task, player.origin)
    tell(f"{task}: {done:,} of {count:,} episodes are there ({player.origin})")
    if done >= count:
        return
    waiting: list[dict[str, Any]] = []
    seed = stream_seed(player.cfg.seed, f"collect {task} {player.origin} {done}")
    act, envs = player.policy(seed), list[Env]()

    def append() -> None:
        nonlocal written
        if waiting:
            _append(out, kept(task, waiting, player.origin), written)
            written += len(waiting)
            totals = [float(np.nansum(e["reward"])) for e in waiting]
            tell(
                f"{task}: {done:,} of {count:,} episodes, return {np.mean(totals):.1f} ± {np.std(totals):.1f} of the "
                f"last {len(totals)} ({player.origin})"
            )
            waiting.clear()

    try:
        for i in range(min(player.width, count - done)):
            env = make_env(player.cfg, stream_seed(seed, f"env {i}") % 2**31)
            envs.append(env)
        last, nbytes = time.monotonic(), 0
        while done < count:
            for episode in _round(envs[: count - done], act, stop):
                rows = episode.rows()
                waiting.append(rows)
                nbytes += sum(x.nbytes for x in rows.values())
                done += 1
            if time.monotonic() - last > _APPEND_SECONDS or nbytes > _APPEND_BYTES:
                append()
                last, nbytes = time.monotonic(), 0
    finally:  # what was done is kept, whatever ended it
        try:
            append()
        finally:
            close_all(envs)


def _round(envs: Sequence[Env], act: Act, stop: Stop) -> list[Episode]:
    """Play an episode in each environment, side by side."""
    obs = [reset(env) for env in envs]
    found = [Episode(o, env.action_dim) for o, env in zip(obs, envs, strict=True)]
    first = True
    while not all(e.ended for e in found):
        seen = np.stack(obs).astype(np.float32)
        actions = act(seen, first)
        check_actions(actions, seen)
        for i, env in enumerate(envs):
            if not found[i].ended:
                now = step(env, actions[i])
                obs[i] = now.obs
                found[i].append(actions[i], now)
                found[i].ended |= len(found[i]) >= env.max_episode_steps
        stop.check()
        first = False
    return found


def _players(source: str, values: dict[str, Any], noise: bool) -> Iterator[Player]:
    path = Path(source).expanduser()
    if not _is_path(source):
        yield _random(source, values)
        return
    digests = set[str]()
    for file in reversed(_checkpoints(path)):
        if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) in digests:
            continue  # a run that ended has its last weights twice
        digests.add(digest)
        agent = load(file, **values)
        choose_threads(agent.cfg)
        if agent.cfg.obs != "state":
            raise DataError(f"{source}: sees pixels, allowed: data sets are of states")
        yield from _of_agent(agent, file, digest[:8], values, noise)


def _random(task: str, values: dict[str, Any]) -> Player:
    try:
        suite_of(task)
    except ConfigError as e:
        why = f"{task!r} is no file or folder, and {e}"
        raise ConfigError(f"{why} Several sources have spaces between them." if "," in task else why) from None
    cfg = Config.from_dict({**values, "task": task, "episodic": True})  # whose episodes may terminate
    if cfg.obs != "state":
        raise DataError(f"config key 'obs': got {cfg.obs!r}, allowed: 'state', of which data sets are")
    width = tried(cfg).need("action_dim")

    def policy(seed: int) -> Act:
        rng = np.random.default_rng(seed)
        return lambda obs, first: rng.uniform(-1, 1, (len(obs), width)).astype(np.float32)

    changed = _settings(values, cfg, Config.from_dict(dict(task=task)))
    return Player(f"random actions, seed {cfg.seed}{changed}", cfg, 1, policy)


def _settings(values: dict[str, Any], cfg: Config, was: Config | None) -> str:
    """Return the settings that change what is played, where they are not those of another config."""
    found = {k: getattr(cfg, k) for k in sorted(values) if k not in _SILENT}
    found = {k: x for k, x in found.items() if was is None or x != getattr(was, k)}
    text = "".join(f", {k}={json.dumps(x, sort_keys=True, default=str)}" for k, x in found.items())
    return text if len(text) <= _LONGEST_SETTINGS else f", settings {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _of_agent(agent: TDMPC2, file: Path, digest: str, values: dict[str, Any], noise: bool) -> Iterator[Player]:
    """Yield a player for each task of an agent, which is loaded again when it plays: many need not be in memory."""
    cfg = agent.cfg
    if cfg.multitask and values.get("task") not in (None, *TASK_SETS):
        raise ConfigError(
            f"config key 'task': got {values['task']!r}, allowed: none with {str(file)!r}, which plays each of its "
            f"tasks ({', '.join(cfg.tasks)})"
        )
    where = file.parent.name if file.parent.name != "checkpoints" and file.stem == "agent" else file.stem
    changed = _settings(values, cfg, checkpoint.read(file)[1])
    origin = f"{cfg.exp_name} {where} ({digest}){' with noise' if noise else ''}, seed {cfg.seed}{changed}"
    width = 1 if agent.device.type == "cpu" else _MOST_ENVS
    for i, task in enumerate(cfg.tasks if cfg.multitask else (cfg.task,)):
        single = cfg.replace(task=task, **_NONE) if cfg.multitask else cfg
        policy = functools.partial(_Policy, file, values, width, i if cfg.multitask else None, not noise)
        form = None if cfg.multitask else cfg
        yield Player(origin, single.replace(checkpoint=None), width, policy, form)


class _Policy:
    """An agent as a policy for environments of one of its tasks."""

    def __init__(
        self, file: Path, values: dict[str, Any], width: int, task: int | None, greedy: bool, seed: int
    ) -> None:
        self.agent, self.task, self.greedy = load(file, **values), task, greedy
        self.planner = Planner(self.agent.model, width, seed=seed)
        self.width = width

    def __call__(self, obs: NDArray[np.float32], first: bool) -> Actions:
        cfg, count = self.agent.cfg, len(obs)
        seen = torch.zeros(self.width if cfg.mpc else count, *cfg.observation_shape)
        seen[:count, : obs.shape[1]] = torch.from_numpy(obs)
        if cfg.mpc:
            action = self.planner.plan(seen, t0=first, eval_mode=self.greedy, task=self.task)
        else:
            action = self.agent.act(seen, eval_mode=self.greedy, task=self.task)
        live = cfg.need("action_dim") if self.task is None else cfg.action_dims[self.task]
        found: Actions = action[:count, :live].cpu().numpy()
        return found


def _checkpoints(path: Path) -> list[Path]:
    """Return the files of the weights in a run's folder, oldest first; of another path, the one meant."""
    found = sorted(path.glob("checkpoints/*-at-*/agent.safetensors"))
    best = path / "checkpoints" / "best.safetensors"
    if best.is_file() and not any(best.samefile(f) for f in found):
        found.insert(0, best)  # the newest checkpoints are kept, and the best one
    return found or [checkpoint.find_checkpoint(path)]


def _append(out: Path, episodes: Kept, before: int) -> None:
    """Append episodes, when no other process does; that takes a moment.

    before: how many of this task and origin must be there.
    """

    def agree(old: Index | None) -> None:
        if (got := _count(old, episodes.task, episodes.origin)) != before:
            raise DataError(
                f"data {str(out)!r}: got {got:,} episodes of {episodes.task} ({episodes.origin}) where {before:,} "
                "were: another process collects the same, allowed: a seed for each"
            )

    end = time.monotonic() + _APPEND_SECONDS
    while True:
        try:
            write(out, [episodes], agree=agree)
            return
        except ConfigError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOOK_SECONDS)


def _there(out: Path, task: str, origin: str) -> int:
    """Return how many episodes of a task and an origin a data set has."""
    return _count(found_index(out) if (out / INDEX).exists() else None, task, origin)


def _count(index: Index | None, task: str, origin: str) -> int:
    shards, origin = () if index is None else index.shards, shortened(origin)
    return sum(s.episodes for s in shards if index and s.origin == origin and index.tasks[s.task].name == task)


def _replay(run: Path) -> Saved:
    """Return the newest checkpoint of a run, if it has a replay that can be taken; else raise `DataError`."""
    saved = Checkpoints(run, 1).newest(warn) if (run / "checkpoints").is_dir() else None
    if saved is None:
        raise DataError(f"{run}: has no checkpoint with a replay, allowed: the folder of a run")
    if saved.cfg.obs != "state" or saved.cfg.multitask:
        raise DataError(f"{run}: its replay is of pixels or several tasks, allowed: states of one task")
    if "replay/episodes" not in saved.tensors:
        raise DataError(f"{run}: has no replay: it learned from data alone; allowed: a run that played")
    return saved


def _from_replay(saved: Saved, out: Path, episodes: int | None, tell: Tell) -> None:
    """Append the newest episodes of the replay of a checkpoint, oldest first."""
    run = saved.folder.parents[1]
    origin = f"replay of {saved.cfg.exp_name} seed {saved.cfg.seed}, {saved.folder.name}"
    if _there(out, saved.cfg.task, origin):
        tell(f"{saved.cfg.task}: its episodes are there ({origin})")
        return
    buffer = ReplayBuffer(saved.cfg.replace(device="cpu"))
    state = {k.removeprefix("replay/"): x for k, x in saved.tensors.items() if k.startswith("replay/")}
    buffer.restore(state, Checkpoints(run, 1).replay.read(saved.chunks))
    table = state["episodes"].tolist()
    oldest = buffer.written - len(buffer)
    spans = [(max(start, oldest), start + length) for start, length in table]
    spans = [(a, b) for a, b in spans if b - a > 1][-(episodes or len(spans)) :]
    if not spans:
        raise DataError(f"{run}: its replay holds no whole episode yet")
    found = [{k: x.numpy() for k, x in buffer.steps(a, b).items()} for a, b in spans]
    for e in found:
        e["terminated"] = e["terminated"].astype(np.float32)
    _append(out, kept(saved.cfg.task, found, origin), 0)
    totals = [float(np.nansum(e["reward"][1:])) for e in found]
    tell(f"{saved.cfg.task}: {len(found):,} episodes, return {np.mean(totals):.1f} ± {np.std(totals):.1f} ({origin})")
