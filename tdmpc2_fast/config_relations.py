"""What the keys of a config must be to each other."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError

CHANNEL_LATENTS = 16
"""Numbers of the pixel encoder's latent, per channel."""


def check_relations(cfg: Any) -> None:
    """Raise `ConfigError` for the first key of a `Config` that does not go with another one; it names both."""

    def need(ok: bool, key: str, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"config key {key!r}: got {getattr(cfg, key)!r}, allowed: {allowed}")

    n, p = cfg.num_samples, cfg.num_pi_trajs
    need(cfg.num_elites <= n, "num_elites", f"at most num_samples ({n})")
    need(p <= n, "num_pi_trajs", f"at most num_samples ({n})")
    need(cfg.min_std <= cfg.max_std, "min_std", f"at most max_std ({cfg.max_std})")
    need(cfg.log_std_min < cfg.log_std_max, "log_std_min", f"less than log_std_max ({cfg.log_std_max})")
    need(cfg.vmin < cfg.vmax, "vmin", f"less than vmax ({cfg.vmax})")
    need(cfg.discount_min <= cfg.discount_max, "discount_min", f"at most discount_max ({cfg.discount_max})")
    need(cfg.latent_dim % cfg.simnorm_dim == 0, "latent_dim", f"a multiple of simnorm_dim ({cfg.simnorm_dim})")
    if cfg.multitask or cfg.tasks:
        need(cfg.obs == "state", "obs", "state in a multi-task model")
        need(not cfg.episodic, "episodic", "false in a multi-task model")
        need(all(isinstance(name, str) and name for name in cfg.tasks), "tasks", "names of tasks")
        need(len({*cfg.tasks}) == len(cfg.tasks), "tasks", "each task once")
    if cfg.obs == "rgb":
        each = CHANNEL_LATENTS
        need(cfg.latent_dim % each == 0, "latent_dim", f"a multiple of {each} where obs=rgb")
        flat, channels = each * cfg.num_channels, cfg.latent_dim // each
        ways = f"{each}*num_channels = {flat} where obs=rgb, or with it num_channels={channels}"
        need(cfg.latent_dim == flat, "latent_dim", ways)
    need(cfg.init_task is None or cfg.init is not None, "init_task", "none without init")
    need(cfg.mix is None or cfg.data_dir is not None, "mix", "none without data_dir")
    need(cfg.mix is None or 0 < cfg.mix < 1, "mix", "between 0 and 1, or none to train on the data alone")
    if cfg.obs_shape is not None:
        need(cfg.obs in cfg.obs_shape, "obs_shape", f"the kind that obs={cfg.obs} asks for among them")
        shape = cfg.obs_shape[cfg.obs]
        if cfg.obs == "rgb":
            ways = "(channels, 64, 64) of 'rgb', channels first; the command `train` turns and scales images itself"
            need(len(shape) == 3 and shape[1:] == (64, 64), "obs_shape", ways)
        else:
            ways = "one dimension of 'state': flatten it, or take images with obs=rgb"
            need(len(shape) == 1, "obs_shape", ways)
    if cfg.multitask:
        need(len(cfg.tasks) > 0, "tasks", "at least one task name where multitask=true")
        need(cfg.task_dim > 0, "task_dim", "at least 1 where multitask=true")
        for key in ("action_dims", "episode_lengths"):
            entries = getattr(cfg, key)
            need(len(entries) == len(cfg.tasks), key, f"one entry per task ({len(cfg.tasks)})")
            need(min(entries) >= 1, key, "at least 1 for each task")
        widest = cfg.action_dim or max(cfg.action_dims)
        need(max(cfg.action_dims) <= widest, "action_dims", f"at most action_dim ({widest})")
    elif not cfg.tasks:
        need(cfg.task_dim == 0, "task_dim", "0 in a single-task model")
