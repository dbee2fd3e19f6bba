"""`accelerate(agent)`: a living official agent plans and learns by our kernels, in place.

Its `plan` and `_update`, which `act` and `update` call, become ours; its parameters, the states of its optimisers,
its running scale and its previous mean are shared, so that everything else about it works as before.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, did_you_mean, kind_of
from ..learn.batch import Batch, Sampler, UpdateTrace
from ..learn.updater import Updater
from ..model.world_model import WorldModel
from ..plan.planner import Planner
from ..rng import PlanNoise, UpdateNoise
from ..runtime.backend import Backend
from ..runtime.by_value import by_value, from_values
from ..runtime.surroundings import undisturbed
from .judged import Judge
from .readings import Readings, plain_model
from .sharing import SharedModel, SharedOptimisers, own_memory

_KEY = "acceleration"
_OURS = ("backend", "precision", "task_grad_leak")
_NEEDED = ("cfg", "model", "_prev_mean")
_TAKEN = dict(_plan_val="plan", _plan="plan", _update="update")
T = TypeVar("T")


@undisturbed
def accelerate(agent: T, **keys: Any) -> T:
    """Have a living official TD-MPC2 agent plan and learn by our kernels, in place, and return it.

    Any commit of the official code of 2025 and 2026 will do, compiled or not, and so will subclasses of its agent.
    Whether it computes what we do is judged first, draw by draw, by its own code: a part that computes something
    else, or has an optimiser of another kind, is named in a warning and left alone. `agent.acceleration` says what
    was taken over. Random numbers come from streams of our own, of the seed `agent.cfg.seed`.

    Copies and pickles of the agent are accelerated, too. To accelerate it again changes nothing.

    Args:
        agent: an object of the official class `TDMPC2`; `tdmpc2_fast.TDMPC2` and the classes of
            `tdmpc2_fast.compat` need no acceleration and are returned as they are.
        keys: `backend`, `precision` or `task_grad_leak`, as in `Config`. What torch is set to decides
            on a GPU where `precision` is not given: `torch.set_float32_matmul_precision("highest")` is float32.

    Raises:
        InputError: no such agent, or nothing of it can be taken over.
        ConfigError: another key.
    """
    if _is_ours(agent) or isinstance(getattr(agent, _KEY, None), Acceleration):
        return agent
    for key in keys:
        if key not in _OURS:
            hint = did_you_mean(key, _OURS) or " Other keys are read from agent.cfg."
            raise ConfigError(f"accelerate: got the key {key!r}, allowed: {', '.join(_OURS)}.{hint}")
    for name in _NEEDED:
        if not hasattr(agent, name):
            raise InputError(f"agent: got {kind_of(agent)} without {name!r}, allowed: an agent of the official TDMPC2")
    if hasattr(getattr(getattr(agent, "model", None), "_Qs", None), "online"):
        raise InputError(
            "agent: got an agent of Newt, which plans and learns otherwise (docs/drop-in.md), allowed: one of TD-MPC2"
        )
    found = Acceleration(agent, keys)
    found.judge()
    found.install()
    return agent


@undisturbed
def deaccelerate(agent: T) -> T:
    """Give an accelerated agent back to its own code, in place, with all it has learned, and return it.

    Every tensor keeps its value, bit for bit, and lies in memory of its own again. An agent that is not
    accelerated is returned as it is.

    Raises:
        InputError: an agent of ours, which has no other code.
    """
    if _is_ours(agent):
        raise InputError(f"agent: got {kind_of(agent)}, which is ours, allowed: an agent of the official TDMPC2")
    found = getattr(agent, _KEY, None)
    if isinstance(found, Acceleration):
        found.undo()
    return agent


def _is_ours(agent: Any) -> bool:
    return isinstance(getattr(agent, "model", None), WorldModel)


class Acceleration:
    """What plans and learns in place of an agent's own code.

    left: what was left alone, and why, by the name of the method.
    """

    def __init__(self, agent: Any, keys: Mapping[str, Any] | None = None) -> None:
        self.agent, self._readings = agent, Readings(agent, keys or {})
        self.left: dict[str, str] = {}
        self._names: dict[str, list[list[str]]] | None = None  # of a copy's parameters, which it has to be given
        self._kept: dict[str, Any] = {}  # what a copy goes on from
        self._before: dict[str, Any] = {}  # attributes of the agent that ours have the place of
        self._asked: tuple[Any, ...] = ()
        self._planner: Planner | None = None
        self._updater: Updater | None = None
        self._optimisers: SharedOptimisers | None = None

    @property
    def planner(self) -> Planner:
        """The planner of the agent's model; its previous mean is the agent's."""
        self._take_in()
        if self._planner is None:
            self._planner = planner = Planner(self.model.fast, 1)
            planner.prev_mean[0].copy_(self.agent._prev_mean)
            if kept := self._kept.pop("planner", None):
                planner.load_state({**from_values(kept), "prev_mean": planner.prev_mean.clone()})
        mean = self._planner.prev_mean[0]
        if self.agent._prev_mean.data_ptr() != mean.data_ptr():
            mean.copy_(self.agent._prev_mean)
            self.agent._prev_mean.data = mean
        return self._planner

    @property
    def updater(self) -> Updater:
        """The updater of the agent's model; its optimisers and running scale are the agent's."""
        self._take_in()
        return self._its_updater()

    def _its_updater(self) -> Updater:
        if self._updater is None:
            state = self.optimisers.state() | dict(scale=own_memory(self.agent.scale.value))
            state |= from_values(self._kept.pop("updater", {}))
            self._updater = Updater(self.model.fast)
            self._updater.load_state(state)
            self._share()
        elif not self.optimisers.holds():  # somebody loaded others
            self._updater.load_state(self._updater.state() | self.optimisers.state())
            self._share()
        return self._updater

    @property
    def backend(self) -> Backend:
        """The backend that plans and learns, and why it is this one."""
        return self.planner.backend

    def __repr__(self) -> str:
        parts = [f"{name} by {self.backend.name}" for name in ("plan", "update") if name not in self.left]
        return "; ".join([*parts, *(f"{name} left alone: {why}" for name, why in self.left.items())])

    # ---- what takes the place of the agent's own

    def plan(
        self,
        obs: Tensor,
        t0: bool = False,
        eval_mode: bool = False,
        task: Tensor | None = None,
        noise: PlanNoise | None = None,
    ) -> Tensor:
        """Plan an action as the official `plan` does: obs (1, *obs_shape) -> (A,) on the agent's device.

        noise: the draws to use; fresh ones where not given.
        """
        return self.planner.plan(obs, bool(t0), bool(eval_mode), task, noise)[0]

    def update(
        self, obs: Tensor, action: Tensor, reward: Tensor, *rest: Tensor, task: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one training step as the official `_update` does, and return its metrics.

        rest: `terminated`, which older generations do not have.
        """
        self._take_in()
        if "update" in self.left:  # it was given back just now
            found: dict[str, Tensor] = self.agent._update(
                obs, action, reward, *rest, **({} if task is None else {"task": task})
            )
            return found
        terminated = rest[0] if rest else torch.zeros_like(reward)
        return self._counted(self._its_updater().step(Batch(obs, action, reward, terminated, task)))

    def learn(
        self, batch: Batch, noise: UpdateNoise | None = None, trace: UpdateTrace | None = None
    ) -> dict[str, Tensor]:
        """Take one training step on a batch; noise and trace as `Updater.step` takes them."""
        return self._counted(self.updater.step(batch, noise, trace))

    def learn_from(self, buffer: Sampler) -> dict[str, Tensor]:
        """Take one training step on a batch of a buffer; kernels draw it themselves from one of ours."""
        return self._counted(self.updater.step_on(buffer))

    def _counted(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self._updater is not None
        self.model.align()
        if self._updater.scale.value.data_ptr() != self.agent.scale.value.data_ptr():  # torch took over from kernels
            self._share()
        self.optimisers.count()
        return metrics

    # ---- begin and end

    def judge(self) -> None:
        """Find out what can be taken over; say what cannot.

        Raises:
            InputError: nothing can.
        """
        self.left = self._judged()
        has_head = getattr(self.model.official, "_termination", None) is not None
        if self.left and has_head and not (self.cfg.episodic or self.cfg.multitask):  # used all the same (April 2025)
            self._readings.keys["episodic"] = True
            left = self._judged()
            if len(left) < len(self.left):
                self.left = left
            else:
                del self._readings.keys["episodic"]
                self._build()
        facts = "; ".join(f"{name}: {why}" for name, why in self.left.items())
        if len(self.left) == 2:
            raise InputError(f"agent: nothing of it can be taken over: {facts}")
        if facts:
            warnings.warn(f"accelerate: left alone: {facts}", UserWarning, stacklevel=4)

    def _judged(self) -> dict[str, str]:
        """Return what the agent's code computes otherwise than ours, or is trained by otherwise, and how."""
        self._build()
        left: dict[str, str] = {}
        found: SharedOptimisers | None = None
        try:
            found = self.optimisers
        except InputError as e:
            left["update"] = str(e)
        judge = Judge(self.agent, self.model.fast, found, self.cfg)
        if (why := judge.why_not_plan()) is not None:
            left["plan"] = why
        if found is not None and (why := judge.why_not_update()) is not None:
            left["update"] = why
        return left

    def install(self) -> None:
        """Put ours in the place of the agent's own."""
        own = self.agent.__dict__
        for name, part in _TAKEN.items():
            if part in self.left:
                continue
            if name in own:
                self._before[name] = own[name]
            own[name] = getattr(self, part)
        own[_KEY] = self
        if "plan" not in self.left:
            assert self.planner is not None  # errors now; an updater is made when the first update comes

    def undo(self) -> None:
        """Give the agent its own code back, and every tensor memory of its own."""
        if not self._asked:  # a copy that has done nothing: its optimisers are given what is theirs
            self._build()
        if not self.model.holds():
            self.model.take()
        self._part()
        self.agent._prev_mean.data = own_memory(self.agent._prev_mean)
        self.model.part()
        for name in (_KEY, *_TAKEN):
            self.agent.__dict__.pop(name, None)
        self.agent.__dict__.update(self._before)

    def _part(self) -> None:
        """Give optimisers and running scale memory of their own."""
        if self._updater is not None:
            self._updater.synchronise()
            self.agent.scale.value.data = own_memory(self.agent.scale.value)
        if self._optimisers is not None:
            self._optimisers.part()

    def _give_back(self, why: str) -> None:
        """Let the agent learn by its own code, since somebody made its optimisers others than ours can be."""
        if _is_ours(self.agent):
            raise InputError(why)
        self.left["update"] = why
        own = self.agent.__dict__
        own.pop("_update", None)
        if "_update" in self._before:
            own["_update"] = self._before.pop("_update")
        warnings.warn(f"accelerate: its own code learns from now on: {why}", UserWarning, stacklevel=2)

    # ---- what is the agent's now

    def _take_in(self) -> None:
        """Build anew, or take tensors anew, where others changed the agent since the last time."""
        if self._readings.now() != self._asked:
            self._build()
        elif not self.model.holds():
            self.model.take()
        else:
            self.model.align()

    def _build(self) -> None:
        kept, is_copy = self._streams(), self._names is not None
        asked, cfg = self._readings.now(), self._readings.config()
        model = SharedModel(plain_model(self.agent), cfg)
        self._part()
        self._kept, self._asked, self.cfg, self.model = kept, asked, cfg, model
        self._planner = self._updater = self._optimisers = None
        if "update" in self.left:
            return
        try:
            self.cfg = cfg.replace(**self.optimisers.rates())
        except InputError as e:
            if self.agent.__dict__.get(_KEY) is self:
                self._give_back(str(e))
            return
        self.model.fast.cfg = self.cfg
        if is_copy and "updater" in self._kept:
            self._its_updater()  # its optimisers have lost what is kept here

    @property
    def optimisers(self) -> SharedOptimisers:
        """The agent's optimisers.

        Raises:
            InputError: they are not as the official ones.
        """
        if self._optimisers is None:
            self._optimisers = SharedOptimisers(self.agent, self.model.fast, self._names)
            self._names = None
        return self._optimisers

    def _share(self) -> None:
        """Have the agent's optimisers and running scale be what the updater works on."""
        assert self._updater is not None
        state = self._updater.state()
        self.optimisers.share(state)
        self.agent.scale.value.data = state["scale"].view(1)
        self.model.align()

    # ---- copies

    def _streams(self) -> dict[str, Any]:
        """Return what another of the same agent goes on from, beside the agent's own tensors."""
        found = dict(self._kept)
        if self._planner is not None:
            found["planner"] = by_value({k: x for k, x in self._planner.state().items() if k != "prev_mean"})
        if self._updater is not None:
            state = self._updater.state()
            found["updater"] = by_value({k: x for k, x in state.items() if k.startswith("rng")})
        return found

    def __getstate__(self) -> dict[str, Any]:
        found, names = self._streams(), self._names
        if self._optimisers is not None:  # of which a copy may not know whose its states are
            names = self._optimisers.names
            state = self._optimisers.state() if self._updater is None else self._updater.state()
            found["updater"] = {**found.get("updater", {}), **by_value(state)}
        return dict(agent=self.agent, keys=self._readings.keys, left=self.left, names=names, kept=found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, state["agent"], state["keys"])
        self.left, self._names, self._kept = state["left"], state["names"], state["kept"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


__all__ = ["Acceleration", "accelerate", "deaccelerate"]
