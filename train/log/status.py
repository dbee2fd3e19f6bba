"""What is known of a run while it goes: how far it is, how fast, and what its parts take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from tdmpc2_fast.config import Config
from tdmpc2_fast.learn.metrics import metric_names

_RATE_SECONDS, _BETWEEN_SAMPLES = 60.0, 0.5
_PACE_SECONDS, _WORTH_A_LINE = 3.0, 10.0  # until an evaluation's pace is known; how long one is that is told of
_PARTS = ("environment", "plan", "draw", "update", "evaluation")
_KEPT = ("decisions", "replay", "last_eval", "best_eval", "eval_seconds")


class Clock:
    """A clock that adds up the seconds of the parts of a run. Parts inside each other count twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to `seconds[name]`, as in `with clock.part("plan"):`."""
        start = self._since[name] = perf_counter()
        try:
            yield
        finally:
            self._since.pop(name, None)
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def so_far(self) -> dict[str, float]:
        """Return `seconds`, with what the parts that are under way took until now."""
        now, total = perf_counter(), dict(self.seconds)
        for name, start in list(self._since.items()):
            total[name] = total.get(name, 0.0) + now - start
        first = [name for name in _PARTS if name in total]
        return {name: total[name] for name in dict.fromkeys([*first, *total])}


class Status:
    """What is known of a run: `RunLog` writes it, displays read it. It keeps no tensor."""

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        action_repeat: int,
        about: Mapping[str, str],
        clock: Clock,
        unit: str = "decisions",
    ) -> None:
        self.cfg, self.folder, self.action_repeat, self.unit = cfg, folder, action_repeat, unit
        self.plays = unit == "decisions"
        self.about, self.clock = dict(about), clock
        self.decisions, self.replay = 0, 0.0
        self.row: Mapping[str, Any] = {}  # the last training episode
        self.last_eval: float | None = None
        self.best_eval: float | None = None
        self.eval_seconds = 0.0  # of the last evaluation
        self.notes: deque[tuple[str, str, bool]] = deque()  # when, what, whether it is a warning
        self.doing: tuple[str, int, int] | None = None
        self.over = False
        self.before = 0.0  # seconds of earlier sessions
        self._start = self._last_step = self._began = perf_counter()
        self._aside, self._skipped = 0.0, 0  # seconds and decisions that say nothing of the speed
        self._long = False
        self._samples: deque[tuple[float, int]] = deque()
        self._first = 0  # decisions of the long stretch at `_began`
        self._foretold = False

    def step(self, decisions: int, replay: float) -> float:
        """Note that a decision was made; return the time."""
        now = perf_counter()
        if self._long:  # the decision around a long stretch says nothing of the speed
            self._aside += now - self._last_step
            self._skipped += decisions - self.decisions
            self._long, self.doing = False, None
        if self.decisions <= self._seed_steps < decisions:
            self._samples.clear()  # decisions without updates, and random ones, are faster
        self._last_step = now
        self.decisions, self.replay = decisions, replay
        sample = self._sample()
        if not self._samples or sample[0] - self._samples[-1][0] >= _BETWEEN_SAMPLES:
            self._samples.append(sample)
        while len(self._samples) > 1 and self._samples[1][0] < sample[0] - _RATE_SECONDS:
            self._samples.popleft()
        return now

    def busy(self, what: str, done: int, total: int) -> float:
        """Note that a long stretch goes on; return the time."""
        now = perf_counter()
        if self.doing is None or self.doing[0] != what:
            self._began, self._first = now, done
        self.doing, self._long = (what, done, total), True
        return now

    def evaluated(self, mean: float) -> None:
        """Note that an evaluation has ended."""
        self.eval_seconds = perf_counter() - (self._last_step if self.doing is None else self._began)
        self.last_eval = mean
        self.best_eval = mean if self.best_eval is None else max(mean, self.best_eval)
        self.doing, self._long = None, True

    def foretold(self, now: float) -> str | None:
        """Say how long the evaluations of this run will take: once, when the pace of the first one is known."""
        if self._foretold or self.eval_seconds or self.doing is None or self.doing[0] != "evaluating":
            return None
        cfg, (_, done, total) = self.cfg, self.doing
        if done == self._first or now - self._began < _PACE_SECONDS:
            return None
        self._foretold = True
        each = (now - self._began) / (done - self._first) * total
        if each < _WORTH_A_LINE:
            return None
        count, length = self._evaluations + (self.decisions < cfg.steps), cfg.episode_length or total
        each_time = cfg.eval_episodes * max(len(cfg.tasks), 1)
        episodes = f"{counted(each_time, 'episode')} of up to {length:,} decisions"
        text = f"an evaluation takes about {hms(each)}: {episodes}; this run has {count}"
        # In plans of one environment: an update takes about as long as one.
        unplanned = 0 if cfg.has_weights else self._seed_steps
        training = cfg.steps if not self.plays else max(cfg.steps - unplanned, 0) + cfg.utd * cfg.steps
        if cfg.mpc and count * each_time * length > training:
            ways = ["a smaller eval_episodes"] * (cfg.eval_episodes > 1) + ["a larger eval_freq"] * (count > 2)
            text += f", probably most of its time. What shortens it: {' or '.join(ways) or 'more steps'}"
        return text

    def state(self) -> dict[str, Any]:
        """Return what `load` takes, JSON-ready."""
        row = {k: v for k, v in self.row.items() if v is None or isinstance(v, (int, float))}
        kept = {name: getattr(self, name) for name in _KEPT}
        return dict(**kept, row=row, elapsed=self.elapsed, seconds=self.clock.seconds)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.row, self.before = state["row"], state["elapsed"]
        self.clock.seconds.update(state["seconds"])

    @property
    def seeding(self) -> bool:
        """Tells whether nothing is learned yet, and actions are random unless the agent began with weights."""
        return self.plays and self.decisions <= self._seed_steps

    @property
    def percent(self) -> str:
        """Decisions made, as a share of all."""
        return f"{100 * self.decisions // self.cfg.steps:3}%"

    @property
    def rate(self) -> float | None:
        """Decisions (or updates) per second in the last minute, pretraining and evaluations left out."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._sample()
        return (last - first) / (end - start) if end > start else None

    @property
    def left(self) -> float | None:
        """Seconds to go: decisions at the recent speed, and evaluations like the last one."""
        rate = self.rate
        if not rate or self.over or self.seeding:
            return None
        return max(self.cfg.steps - self.decisions, 0) / rate + self._evaluations * self.eval_seconds

    @property
    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.before + perf_counter() - self._start

    @property
    def losses(self) -> list[tuple[str, float]]:
        """Losses of the last training episode's last update, by short name."""
        hidden = ("total_loss",) if self.cfg.episodic else ("total_loss", "termination_loss")
        names = [n for n in metric_names(self.cfg.episodic) if n.endswith("_loss") and n not in hidden]
        found = ((name.removesuffix("_loss"), self.row.get(name)) for name in names)
        return [(name, value) for name, value in found if value is not None]

    @property
    def _seed_steps(self) -> int:
        return (self.cfg.seed_steps or 0) if self.plays else 0

    @property
    def _evaluations(self) -> int:
        """How many come after this decision, the one at the end included; an episode has one at most."""
        cfg = self.cfg
        boundaries = 0 if cfg.episodic or not self.plays else cfg.num_envs * (cfg.episode_length or 0)
        period = max(cfg.eval_freq, boundaries)
        return max((cfg.steps - 1) // period - self.decisions // period, 0) + 1

    def _sample(self) -> tuple[float, int]:
        return self._last_step - self._start - self._aside, self.decisions - self._skipped


def counted(count: int, what: str) -> str:
    """Write a count with its noun, such as "1 episode" or "1,500 rows"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def returned(mean: float, std: float, episodes: int) -> str:
    """Write what an evaluation returned."""
    return f"return {mean:.1f} ± {std:.1f} over {counted(episodes, 'episode')}"


def hms(seconds: float | None) -> str:
    """Write seconds as hours, minutes and seconds."""
    if seconds is None:
        return "-:--:--"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
