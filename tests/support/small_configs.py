"""Completed configs of models that run in milliseconds."""

from __future__ import annotations

from typing import Any

from tdmpc2_fast import Config

TINY = dict(latent_dim=16, mlp_dim=24, enc_dim=16, num_q=3, num_samples=32, num_elites=8, num_pi_trajs=4, batch_size=8)


def tiny_config(obs_dim: int = 5, action_dim: int = 2, episode_length: int = 50, **changes: Any) -> Config:
    """A completed config of a model that runs in milliseconds."""
    cfg = Config.from_dict({**TINY, "device": "cpu", **changes})
    return cfg.with_env({"state": (obs_dim,)}, action_dim, episode_length)


def tiny_multitask(**changes: Any) -> Config:
    """Three tasks with 1, 3 and 2 live action dims."""
    keys = dict(
        multitask=True,
        tasks=("a", "b", "c"),
        action_dims=(1, 3, 2),
        episode_lengths=(50, 100, 500),
        task_dim=4,
    )
    return tiny_config(action_dim=3, **{**keys, **changes})
