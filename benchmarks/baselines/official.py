"""The official implementation as a baseline, imported from a checkout the user names.

Nothing of it is copied or written to. Its sources name the device `cuda:0`; where another one is
measured, that name is replaced on the way into the interpreter, and with it `capturable=True`, which
torch's Adam allows on a GPU only, and the question how much memory a GPU has free. Random numbers are
given to it for the comparison of results alone; what is timed is its own code, compiled as it ships on
a GPU, with products in tf32 as its train.py sets them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.compat.accelerate import accelerate
from tdmpc2_fast.compat.draws import given, plan_order, updated
from tdmpc2_fast.learn.updater import Batch
from tdmpc2_fast.rng import PlanNoise
from tdmpc2_fast.runtime.backend import torch_products

from ..harness.agents import agent_of, numbers, update_draws, within
from ..harness.measure import CannotMeasureError, Gate, Variant

_MODULES = ("tdmpc2", "common", "envs", "trainer")
_LOADS = itertools.count()


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the official modules in a checkout and loads them for a device."""

    def __init__(self, checkout: str, device: torch.device) -> None:
        self.folder, self.device = Path(checkout, "tdmpc2"), device

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in _MODULES:
            return None
        file = self.folder.joinpath(*fullname.split("."))
        package = file.is_dir()
        file = file / "__init__.py" if package else file.with_suffix(".py")
        if not file.is_file():
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=str(file), is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        origin = str(module.__spec__.origin)
        text = Path(origin).read_text()
        if self.device.type != "cuda":
            text = text.replace("capturable=True", "capturable=False").replace("torch.cuda.mem_get_info()", "(0, 0)")
        module.__file__ = origin
        exec(compile(text.replace("cuda:0", str(self.device)), origin, "exec"), module.__dict__)


def load_official(checkout: str, device: torch.device) -> ModuleType:
    """Import the official module `tdmpc2` for a device; other modules of these names are left alone."""
    return import_official(checkout, device, "tdmpc2")[0]


def import_official(checkout: str, device: torch.device, *names: str) -> list[ModuleType]:
    """Import official modules for a device, all of one piece; other modules of these names are left alone.

    Its modules are kept under names of their own, because torch.compile imports the modules of functions that it
    traces by name.

    Raises:
        CannotMeasureError: a package it needs is missing.
    """
    ours = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] in _MODULES}
    finder = _Sources(checkout, device)
    sys.meta_path.insert(0, finder)
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as e:
        raise CannotMeasureError(f"the official code needs {e.name}, which is not installed") from e
    finally:
        sys.meta_path.remove(finder)
        prefix = f"official{next(_LOADS)}"
        for name in [n for n in sys.modules if n.split(".")[0] in _MODULES]:
            module = sys.modules.pop(name)
            module.__name__ = f"{prefix}.{name}"
            sys.modules[module.__name__] = module
        sys.modules |= ours


def official_agent(checkout: str, agent: TDMPC2, compiled: bool, **changes: Any) -> Any:
    """Return an official agent with the weights of ours."""
    module = load_official(checkout, agent.device)
    cfg = OfficialConfig(**agent.cfg.to_dict() | changes)
    cfg.compile = compiled
    cfg.iterations = agent.cfg.iterations  # it adds the two for many actions itself
    cfg.bin_size = agent.cfg.bin_size
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = module.TDMPC2(cfg)
    theirs.load({"model": dict(agent.model.state_dict())})
    theirs.model.eval()
    return theirs


class OfficialConfig(SimpleNamespace):
    """The official `cfg`: attributes, and `get`."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value; `default` where there is none."""
        return getattr(self, key, default)


def official_plan(checkout: str, agent: TDMPC2, obs: Tensor, noise: PlanNoise) -> Variant:
    """Return its `act` on one observation; compared is one plan from the same draws in float32."""
    theirs = official_agent(checkout, agent, compiled=agent.device.type == "cuda")

    def gate() -> Gate:
        plain = official_agent(checkout, agent, compiled=False)
        ours = TDMPC2(agent.cfg.replace(precision="float32", backend="torch"), 1)
        ours.load(agent.model.state_dict())
        with torch_products(tf32=False):
            with given(plan_order(noise)), torch.no_grad():
                wanted = plain.act(obs)
            got = ours.planner.plan(obs.unsqueeze(0), False, False, None, noise)[0].cpu()
        return Gate(float((got - wanted).abs().max()), 1e-3)

    return Variant(within(agent.cfg, agent.device, lambda: theirs.act(obs)), gate=gate)


def accelerated_plan(checkout: str, agent: TDMPC2, obs: Tensor, noise: PlanNoise) -> Variant:
    """Return the `act` of an official agent that was accelerated; compared is one plan from the draws of ours."""
    theirs = _accelerated(checkout, agent)

    def gate() -> Gate:
        theirs._prev_mean.zero_()
        agent.planner.prev_mean.zero_()
        got = theirs.acceleration.plan(obs.unsqueeze(0), noise=noise)
        wanted = agent.planner.plan(obs.unsqueeze(0).expand(agent.planner.num_envs, -1), noise=noise)[0]
        return Gate(float((got - wanted).abs().max()), 1e-3)

    return Variant(lambda: theirs.act(obs), gate=gate)


def accelerated_update(checkout: str, agent: TDMPC2, batch: Batch) -> Variant:
    """Return the `update` of an official agent that was accelerated; compared are its metrics, from equal draws."""
    theirs = _accelerated(checkout, agent)
    buffer = SimpleNamespace(sample=lambda: tuple(batch))

    def gate() -> Gate:
        ours = agent_of(agent.cfg)
        other = _accelerated(checkout, ours)
        noise = update_draws(agent.cfg, agent.device)
        got, wanted = other.acceleration.learn(batch, noise), ours.updater.step(batch, noise)
        return Gate.of_metrics(numbers(wanted), numbers(got), 1e-3)

    return Variant(lambda: theirs.update(buffer), gate=gate)


def _accelerated(checkout: str, agent: TDMPC2) -> Any:
    theirs = official_agent(checkout, agent, compiled=False)
    return accelerate(theirs, backend=agent.cfg.backend, precision=agent.cfg.precision)


def official_update(checkout: str, agent: TDMPC2, batch: Batch) -> Variant:
    """Return its `update` on our batch; compared is one in float32 without dropout, whose masks it draws itself."""
    theirs = official_agent(checkout, agent, compiled=agent.device.type == "cuda")
    buffer = SimpleNamespace(sample=lambda: tuple(batch))

    def gate() -> Gate:
        cfg = agent.cfg.replace(precision="float32", dropout=0.0)
        ours = agent_of(cfg)
        plain = official_agent(checkout, ours, compiled=False)
        noise = update_draws(cfg, agent.device)
        with torch_products(tf32=False):
            got = ours.updater.step(batch, noise)
            wanted = updated(plain, batch, noise)
        return Gate.of_metrics(numbers(got), numbers(wanted), 1e-3)

    return Variant(within(agent.cfg, agent.device, lambda: theirs.update(buffer)), gate=gate)
