"""Everything two training runs with equal seeds must agree in, bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.learn.torch_update import TorchUpdate
from tdmpc2_fast.train.log.run_log import WALL_CLOCK
from tdmpc2_fast.train.run.trainer import OnlineTrainer


def everything(trainer: OnlineTrainer) -> dict[str, Any]:
    """By name, as bytes or text: parameters, optimisers, scale, replay, random streams, CSVs."""
    agent, buffer = trainer.agent, trainer.buffer
    found: dict[str, Any] = {f"model {k}": v for k, v in tensors_only(agent.model.state_dict()).items()}
    found["scale"] = agent.updater.scale.value
    found |= {f"replay {k}": v for k, v in buffer.steps(buffer.written - len(buffer), buffer.written).items()}
    found["replay table"] = buffer._table[: buffer._last]
    streams = dict(plan=agent.planner.generator)
    update = agent.updater._update
    if isinstance(update, TorchUpdate):
        for name, optim in (("optim", update.optim), ("pi_optim", update.pi_optim)):
            for i, state in optim.state_dict()["state"].items():
                found |= {f"{name} {i} {k}": v for k, v in state.items()}
        assert buffer._generator is not None
        streams |= dict(replay=buffer._generator, update=update.generator)
    else:
        found["counter"] = update.chain.inputs.rng
        for flat in (update.chain.world, update.chain.policy):
            found |= {f"{len(flat.param)} {k}": getattr(flat, k) for k in ("exp_avg", "exp_avg_sq", "step")}
    found |= {f"stream {k}": g.get_state() for k, g in streams.items()}
    found["warm start"] = agent.planner.prev_mean
    found |= {f"metric {k}": v for k, v in trainer.metrics.items()}
    # Bytes: unlike comparison, they tell NaN from NaN and 0 from -0.
    found = {k: v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in found.items()}
    return found | csvs(trainer.folder)


def csvs(folder: Path) -> dict[str, str]:
    """The CSV files of a run by name, without the columns that tell the time."""
    return {p.name: _untimed(p) for p in folder.glob("*.csv")}


def _untimed(path: Path) -> str:
    with path.open(newline="") as f:
        rows = list(csv.reader(f))
    kept = [i for i, name in enumerate(rows[0]) if name not in WALL_CLOCK]
    return "".join(",".join(row[i] for i in kept) + "\n" for row in rows)
