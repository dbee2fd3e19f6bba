"""That observations, actions and rewards of a simulator never visit the host: on a rehearsed device, which tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from conftest import PYTHONPATH, ROOT

# Steps a run on a device where waiting is an error, and prints what was copied to the host: how, shape, dtype.
WATCH = """
import json, pathlib, sys, tempfile, traceback
import rehearsal, torch
rehearsal.begin()
import point_mass
from small_configs import TINY
from tdmpc2_fast import Config
from tdmpc2_fast.train.run.trainer import OnlineTrainer

point_mass.install()
point_mass.SHORTEST = point_mass.LONGEST  # all end together, so that most decisions end no episode
copied = []


class Watch(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("copy_", "cpu", "numpy", "tolist", "item"):
            x = args[name == "copy_"]
            if rehearsal.on_gpu(x) and not (name == "copy_" and rehearsal.on_gpu(args[0])):
                copied.append((name, list(x.shape), str(x.dtype)))
        return func(*args, **(kwargs or {}))


keys = dict(
    TINY, task=point_mass.DEVICE, device="cuda", num_envs=3, utd=0, seed_steps=1, steps=1000, eval_freq=10**6,
    tensorboard=False, display="none", save_agent=False, mpc=sys.argv[1] == "plan", num_samples=8, num_elites=4,
    num_pi_trajs=2, iterations=1,
)
with rehearsal.without_kernels():
    trainer = OnlineTrainer(Config.from_dict(keys), pathlib.Path(tempfile.mkdtemp()))
    assert trainer.agent.backend.name == "triton" and trainer.envs.device.type == "cuda"
    trainer.agent.updater.step_on = lambda buffer: {}  # what an update waits for is for its own tests
    plan = trainer.agent.plan
    trainer.agent.plan = lambda *given: torch.zeros_like(plan(*given))  # kernels that compute nothing leave anything
    while not trainer.progress.seeded or trainer.rollouts.at_boundary:
        trainer.step()
    trainer.step()  # the episodes are begun
    found = []
    for decision in range(2 * point_mass.LONGEST):
        ends = trainer.rollouts.at_boundary
        copied.clear()
        torch.cuda.set_sync_debug_mode("default" if ends else "error")
        with Watch():
            trainer.step()
        torch.cuda.set_sync_debug_mode("default")
        found.append((ends, list(copied)))
    seen = trainer.buffer.steps(0, trainer.buffer.written)
    assert seen["obs"].isfinite().all()
    torch.cuda.set_sync_debug_mode("error")
    try:  # that it would be told
        trainer.rollouts._steps["obs"].cpu()
        told = False
    except RuntimeError as e:
        told = "synchronizing" in str(e)
print(json.dumps([found, told]))
"""


def watched(how: str) -> tuple[list[tuple[bool, list[Any]]], bool]:
    paths = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCH, how],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=paths, TRITON_INTERPRET="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: tuple[list[tuple[bool, list[Any]]], bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_decision_copies_its_flags_to_the_host_and_waits_for_nothing_else() -> None:
    for how in ("plan", "prior"):
        found, told = watched(how)
        assert told
        assert [ends for ends, _ in found].count(True) == 2
        flags, sums = ["copy_", [6, 3], "torch.bool"], ["tolist", [3, 3], "torch.float64"]
        for ends, copied in found:  # where episodes ended, also what the log has of them
            assert copied == ([sums, flags] if ends else [flags]), how
