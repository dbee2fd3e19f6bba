"""The drop-in, shown on a checkout of the official code: `python -m tdmpc2_fast.benchmarks.dropin CHECKOUT`.

Its agents are accelerated: same actions draw by draw, same parameters after three updates, and given back bit for bit.
Its own train.py and evaluate.py run with our modules in the place of its agent and buffer, for a few thousand
decisions of a small model. A copy of the checkout is changed for that: names of devices where there is no GPU,
what gymnasium 1 asks of its environments, and the two imports. Needs hydra-core, tensordict, termcolor, pandas.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdmpc2_fast import Config
from tdmpc2_fast.compat.accelerate import accelerate, deaccelerate
from tdmpc2_fast.compat.draws import given, plan_order, updated
from tdmpc2_fast.learn.batch import Batch
from tdmpc2_fast.rng import PlanNoise, UpdateNoise

from .baselines.official import OfficialConfig
from .harness.agents import as_trained

SMALL = dict(enc_dim=64, mlp_dim=64, latent_dim=64, num_samples=64, num_elites=8, num_pi_trajs=4, batch_size=16)
_STATE = dict(obs_shape={"state": (17,)}, action_dim=6, episode_length=500)
CASES: dict[str, dict[str, Any]] = {
    "state": _STATE,
    "22 action dimensions": _STATE | dict(action_dim=22),
    "episodic": _STATE | dict(episodic=True),
    "several tasks": _STATE
    | dict(multitask=True, tasks=("a", "b"), action_dims=(2, 6), episode_lengths=(500, 100), task_dim=8),
    "pixels": dict(obs="rgb", obs_shape={"rgb": (9, 64, 64)}, action_dim=6, episode_length=500, latent_dim=512),
}
TASK = "pendulum-swingup"
LIMIT = 1e-4
_UPDATES = 3
_IMPORTS = {
    "from common.buffer import Buffer": "from tdmpc2_fast.compat.common.buffer import Buffer",
    "from tdmpc2 import TDMPC2": "from tdmpc2_fast.compat.tdmpc2 import TDMPC2",
}


def prepared(checkout: Path, to: Path, ours: bool) -> Path:
    """Copy the official sources to a folder, changed to run on this machine, and return where they are.

    ours: also change the imports of its agent and buffer to our modules.
    """
    if not (checkout / "tdmpc2" / "tdmpc2.py").is_file():
        raise SystemExit(f"{str(checkout)!r}: got no tdmpc2/tdmpc2.py in it, allowed: a checkout of the official code")
    for source in (checkout / "tdmpc2").rglob("*"):
        if source.is_dir() or source.suffix not in (".py", ".yaml", ".xml"):
            continue
        text = source.read_text()
        if not torch.cuda.is_available():
            text = text.replace("cuda:0", "cpu").replace("torch.device('cuda')", "torch.device('cpu')")
            text = text.replace("capturable=True", "capturable=False").replace("assert torch.cuda.is_available()", "")
        text = text.replace("class DMControlWrapper:", "class DMControlWrapper(gym.Env):")
        text = text.replace("gym.logger.set_level(40)", "gym.logger.min_level = 40")
        if source.name == "config.yaml":
            text = re.sub(r"defaults:\n\s+- override hydra/launcher: \S+\n", "", text)
        if source.parent.name == "wrappers":  # gymnasium 1 no longer looks attributes up in what is wrapped
            look_up = "\\1\n\tdef __getattr__(self, name):\n\t\treturn getattr(self.env, name)\n"
            text = re.sub(r"(class \w+\(gym\.Wrapper\):)", look_up, text)
        if ours and source.parent.name != "common":
            for theirs, instead in _IMPORTS.items():
                text = text.replace(theirs, instead)
        target = to / source.relative_to(checkout / "tdmpc2")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return to


# ---- agents


def official_agent(module: Any, cfg: Config) -> Any:
    """Return an official agent with weights as large as a trained model's."""
    theirs = OfficialConfig(**cfg.to_dict(), compile=False, bin_size=cfg.bin_size)
    with contextlib.redirect_stdout(io.StringIO()):
        agent = module.TDMPC2(theirs)
    as_trained(agent.model, 1)
    return agent


class Trial:
    """Two official agents of equal weights, and inputs and draws for them."""

    def __init__(self, module: Any, name: str) -> None:
        self.cfg = cfg = Config(**{**SMALL, **CASES[name], "dropout": 0.0, "device": "auto"})
        self.agent, self.plain = official_agent(module, cfg), official_agent(module, cfg)
        state = self.agent.model.state_dict()
        own = {k: x.clone() if isinstance(x, Tensor) else x for k, x in state.items()}
        self.plain.model.load_state_dict(own)
        self.device = next(self.agent.model.parameters()).device
        self.random = torch.Generator(self.device).manual_seed(2)
        for agent in (self.agent, self.plain):  # moments to be taken over
            updated(agent, self.batch(3), UpdateNoise.draw(cfg, torch.Generator(self.device).manual_seed(3)))

    def observations(self, g: torch.Generator, *rows: int) -> Tensor:
        """Return random observations (*rows, *obs_shape)."""
        shape = (*rows, *self.cfg.observation_shape)
        if self.cfg.obs == "rgb":
            return torch.randint(0, 256, shape, generator=g, device=self.device, dtype=torch.uint8)
        return torch.randn(shape, generator=g, device=self.device)

    def batch(self, seed: int) -> Batch:
        """Return a random batch."""
        g, (h, b) = torch.Generator(self.device).manual_seed(seed), (self.cfg.horizon, self.cfg.batch_size)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=g, device=self.device)

        terminated = (uniform(h, b, 1) < 0.2).float() * self.cfg.episodic
        task = (uniform(b) * len(self.cfg.tasks)).long() if self.cfg.multitask else None
        action, reward = 2 * uniform(h, b, self.cfg.need("action_dim")) - 1, 4 * uniform(h, b, 1) - 2
        return Batch(self.observations(g, h + 1, b), action, reward, terminated, task)

    def plans_apart(self) -> float:
        """Return how far actions and means of three plans lie apart."""
        worst = 0.0
        for i in range(3):
            noise = PlanNoise.draw(self.cfg, 1, self.random)
            obs = self.observations(self.random, 1)
            task = torch.tensor([i % 2], device=self.device) if self.cfg.multitask else None
            with given(plan_order(noise)), torch.no_grad():
                wanted = self.plain.plan(obs, t0=i == 0, eval_mode=False, task=task)
            got = self.agent.acceleration.plan(obs, i == 0, False, task, noise)
            worst = max(worst, _apart(got, wanted), _apart(self.agent._prev_mean, self.plain._prev_mean))
        return worst

    def updates_apart(self) -> float:
        """Return how far parameters, moments and scale lie apart after three updates."""
        for i in range(_UPDATES):
            batch, noise = self.batch(10 + i), UpdateNoise.draw(self.cfg, self.random)
            updated(self.plain, batch, noise)
            self.agent.acceleration.learn(batch, noise)
        return max(_apart(x, y) for x, y in zip(_numbers(self.agent), _numbers(self.plain), strict=True))


def _numbers(agent: Any) -> list[Tensor]:
    """Return everything an agent has learned."""
    found = [x for x in agent.model.state_dict().values() if isinstance(x, Tensor)]
    for optim in (agent.optim, agent.pi_optim):
        kept = optim.state_dict()["state"]
        found += [kept[i][k] for i in kept for k in ("step", "exp_avg", "exp_avg_sq")]
    return [x.detach().double().cpu() for x in [*found, agent.scale.value]]


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x.double().cpu() - y.double().cpu()).abs().max())


def agents(module: Any, name: str) -> Iterator[tuple[str, bool, str]]:
    """Yield what is shown of one kind of agent, whether it holds, and the figure."""
    trial = Trial(module, name)
    agent = trial.agent
    before = _numbers(agent)
    accelerate(agent)
    yield "accelerated", not agent.acceleration.left, str(agent.acceleration)
    yield "nothing changed by that", all(map(torch.equal, before, _numbers(agent))), ""
    apart = trial.plans_apart()
    yield "actions draw by draw", apart <= LIMIT, f"{apart:.1e}"
    apart = trial.updates_apart()
    yield f"parameters after {_UPDATES} updates", apart <= LIMIT, f"{apart:.1e}"
    others = [copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))]
    batch, noise = trial.batch(20), UpdateNoise.draw(trial.cfg, trial.random)
    for each in (agent, *others):
        each.acceleration.learn(batch, noise)
    same = all(torch.equal(x, y) for each in others for x, y in zip(_numbers(agent), _numbers(each), strict=True))
    yield "copies and pickles learn alike", same, ""
    kept = _numbers(agent)
    deaccelerate(agent)
    yield "given back bit for bit", all(map(torch.equal, kept, _numbers(agent))), ""
    yield "with its own code", not {"acceleration", "_plan_val", "_plan", "_update"} & agent.__dict__.keys(), ""
    trial.plain, trial.agent = agent, others[0]
    apart = trial.updates_apart()
    yield "and learns on as its copy does", apart <= LIMIT, f"{apart:.1e}"


# ---- scripts


def script(folder: Path, name: str, words: Sequence[str]) -> tuple[bool, str]:
    """Run one of the official scripts; return whether it came to its end, and its last words."""
    common = [f"task={TASK}", "compile=false", "enable_wandb=false", "save_video=false", "hydra.run.dir=.", *words]
    keys = [f"{k}={v}" for k, v in SMALL.items()]
    run = subprocess.run(
        [sys.executable, name, *common, *keys],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MUJOCO_GL": "disabled",
            "HYDRA_FULL_ERROR": "1",
        },
    )
    lines = [re.sub(r"\x1b\[\d+m", "", x).strip() for x in (run.stdout + run.stderr).splitlines() if x.strip()]
    return run.returncode == 0, lines[-1] if lines else ""


def scripts(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield what comes of training and evaluating by the official scripts."""
    start = time.monotonic()
    good, last = script(folder, "train.py", ["steps=3000", "eval_freq=1500", "eval_episodes=1", "exp_name=dropin"])
    yield "train.py, 3,000 decisions", good, f"{last} ({time.monotonic() - start:.0f} s)"
    weights = sorted(folder.rglob("*.pt"))
    yield "it wrote weights", bool(weights), ""
    if weights:
        good, last = script(folder, "evaluate.py", [f"checkpoint={weights[-1]}", "eval_episodes=1"])
        yield "evaluate.py", good, last


def main(argv: Sequence[str] | None = None) -> int:
    """Show all of it; return 0 if it holds, 1 if something does not."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1:
        print(__doc__)
        return 2
    checkout = Path(words[0]).expanduser()
    failed = 0

    def show(what: str, found: Iterator[tuple[str, bool, str]]) -> None:
        nonlocal failed
        for name, good, figure in found:
            print(f"{'ok  ' if good else 'FAIL'} {what:22} {name:32} {figure}", flush=True)
            failed += not good

    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(prepared(checkout, Path(folder, "theirs"), ours=False)))
        try:
            module = importlib.import_module("tdmpc2")
            for name in CASES:
                show(name, agents(module, name))
        finally:
            sys.path.pop(0)
        show("its scripts, our modules", scripts(prepared(checkout, Path(folder, "ours"), ours=True)))
    print(f"{failed} of these do not hold" if failed else "all of it holds")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
