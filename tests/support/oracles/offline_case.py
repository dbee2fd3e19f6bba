"""The run that both offline trainers make: four tasks of unlike widths, a small model, given draws."""

from __future__ import annotations

from pathlib import Path

import torch
from golden_cases import _load_formula

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.compat.state_dict import add_official_entries, tensors_only
from tdmpc2_fast.model.checkpoint import load_into
from tdmpc2_fast.train.data.convert import convert
from tdmpc2_fast.train.data.dataset import DataSet

GOLDEN = Path(__file__).parents[2] / "golden"
EPISODES, RECORDED = GOLDEN / "offline" / "episodes.pt", GOLDEN / "offline" / "official.npz"
UPDATES, PER_TASK, DECISIONS = 20, 3, 20
SIZES = {"walker-walk": (24, 6), "cup-catch": (8, 2), "acrobot-swingup": (6, 1), "pendulum-swingup": (3, 1)}
NOISE = ("td_eps", "td_members", "pi_eps", "pi_members")
"""Fields of an `UpdateNoise` of a model without dropout."""


def config(**changes: object) -> Config:
    """The completed config of the run."""
    keys = dict(
        task="four",
        tasks=tuple(SIZES),
        latent_dim=16,
        mlp_dim=24,
        enc_dim=16,
        task_dim=8,
        num_q=3,
        dropout=0.0,
        batch_size=16,
        steps=UPDATES,
        eval_freq=10**6,
        device="cpu",
        display="none",
        **changes,
    )
    return Config.from_dict(keys)


def with_given_weights(agent: TDMPC2) -> TDMPC2:
    """Set an agent's weights to those that a formula gives."""
    make = _load_formula(GOLDEN).make
    state = tensors_only(agent.model.state_dict())
    made = {
        k: torch.from_numpy(make(k, tuple(v.shape), "multitask")) for k, v in state.items() if v.ndim and k[0] == "_"
    }
    made["_action_masks"] = state["_action_masks"]
    load_into(agent.model, add_official_entries(state | made, "", agent.cfg.num_q, torch.device("cpu")))
    return agent


def data_in(folder: Path) -> DataSet:
    """Convert the official file, and open what came of it."""
    convert([EPISODES], folder, tasks=",".join(SIZES))
    return DataSet.open(folder)
