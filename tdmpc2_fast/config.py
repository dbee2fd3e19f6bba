"""The one configuration of the project: a frozen, validated dataclass with the official names.

Names, defaults and model sizes are those of the official TD-MPC2 `config.yaml`; keys that
exist only here come last or with what they change. Lengths are counted in *decisions*: one call of the
planner, however often the environment repeats the action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tdmpc2_fast.kernels.layers.sizes import MODEL_SIZES as MODEL_SIZES

from .config_relations import CHANNEL_LATENTS, check_relations
from .config_values import checked, plain
from .environment import sizes_of
from .errors import ConfigError, did_you_mean, kind_of
from .task_sets import TASK_SETS, keys_of, set_dims, set_keys
from .task_sets import task_embedding_dim as task_embedding_dim

DEFAULT_DIMS = MODEL_SIZES[5] | dict(num_channels=32)
"""Architecture where neither `model_size` nor the dims themselves are given, as in `config.yaml`."""

LARGE_ACTION_DIM = 20
_RETIRED = ("compile",)  # keys of older versions
_OFFICIAL_ONLY = ("task_title", "obs_shapes", "bin_size", *_RETIRED)  # which look like other keys mistyped


def _key(
    group: str,
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Return a config field that carries its meaning and range, for validation, and with its group for `--help`."""
    meta = dict(group=group, help=help, low=low, high=high, open_low=open_low, choices=choices)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """Everything that defines an agent and a run.

    Build one with keyword arguments, `Config.from_dict` or `Config.from_official`; every
    value is checked on construction and a bad one raises `ConfigError`. `obs_shape`,
    `action_dim` and `episode_length` come from the environment (`with_env`); of `task="mt30"`
    and `"mt80"` they are known, and so is everything else of a multi-task model. `tasks` makes a set of one's own, of
    the name `task`: complete where all of them are official ones whose sizes `task_sets` has, else by `with_tasks`.
    """

    key = partial(_key, "environment")
    task: str = key("walker-walk", "task name, e.g. walker-walk or Hopper-v5")
    obs: str = key("state", "kind of observation", choices=("state", "rgb"))
    episodic: bool = key(False, "the task can end by termination (adds a termination head)")

    key = partial(_key, "evaluation")
    checkpoint: str | None = key(None, "checkpoint to start from or to evaluate")
    eval_episodes: int = key(10, "episodes per evaluation", low=1)
    eval_freq: int = key(50_000, "decisions between evaluations", low=1)

    key = partial(_key, "training")
    steps: int = key(10_000_000, "decisions to train for", low=1)
    batch_size: int = key(256, "slices per update", low=1)
    reward_coef: float = key(0.1, "weight of the reward loss", low=0)
    value_coef: float = key(0.1, "weight of the value loss", low=0)
    termination_coef: float = key(1.0, "weight of the termination loss", low=0)
    consistency_coef: float = key(20.0, "weight of the latent consistency loss", low=0)
    rho: float = key(0.5, "decay of loss weights along the horizon", low=0, high=1)
    lr: float = key(3e-4, "learning rate", low=0, open_low=True)
    enc_lr_scale: float = key(0.3, "encoder learning rate as a share of lr", low=0)
    grad_clip_norm: float = key(20.0, "gradient norm is clipped to this", low=0, open_low=True)
    tau: float = key(0.01, "step of target networks and running scale", low=0, high=1)
    discount_denom: float = key(5.0, "discount = (T/d - 1)/(T/d) for T decisions", low=0, open_low=True)
    discount_min: float = key(0.95, "smallest discount", low=0, high=1)
    discount_max: float = key(0.995, "largest discount", low=0, high=1)
    buffer_size: int = key(1_000_000, "replay capacity in decisions", low=1)
    exp_name: str = key("default", "name of the experiment, part of the run folder")
    data_dir: str | None = key(None, "folder of an offline data set")

    key = partial(_key, "planning")
    mpc: bool = key(True, "act by planning; false acts by the policy prior")
    iterations: int = key(6, "MPPI iterations; 2 more where action_dim >= 20", low=1)
    num_samples: int = key(512, "action sequences per iteration", low=1)
    num_elites: int = key(64, "sequences that shape the next distribution", low=1)
    num_pi_trajs: int = key(24, "sequences drawn from the policy prior", low=0)
    horizon: int = key(3, "planning horizon and length of training slices", low=1)
    min_std: float = key(0.05, "smallest sampling std", low=0)
    max_std: float = key(2.0, "largest and initial sampling std", low=0, open_low=True)
    temperature: float = key(0.5, "sharpness of the elite weights", low=0)

    key = partial(_key, "policy prior")
    log_std_min: float = key(-10, "smallest log std of the policy")
    log_std_max: float = key(2, "largest log std of the policy")
    entropy_coef: float = key(1e-4, "weight of the policy entropy", low=0)

    key = partial(_key, "critic")
    num_bins: int = key(101, "bins of discrete regression; 1 symlog, 0 plain regression", low=0)
    vmin: float = key(-10, "lowest bin, in symlog space")
    vmax: float = key(10, "highest bin, in symlog space")

    key = partial(_key, "architecture")
    model_size: int | None = key(None, "millions of parameters; sets dims not given", choices=(None, *MODEL_SIZES))
    num_enc_layers: int = key(None, "encoder layers", low=1)
    enc_dim: int = key(None, "encoder width", low=1)
    num_channels: int = key(None, "channels of the pixel encoder, latent_dim / 16", low=1)
    mlp_dim: int = key(None, "width of all heads", low=1)
    latent_dim: int = key(None, "width of the latent z", low=1)
    task_dim: int = key(0, "width of the task embedding; 0 for a single task", low=0)
    num_q: int = key(None, "critics", low=2)
    dropout: float = key(0.01, "dropout in the first layer of the critics", low=0, high=0.99)
    simnorm_dim: int = key(8, "width of a SimNorm group", low=1)

    key = partial(_key, "logging")
    wandb_project: str | None = key(None, "Weights & Biases project")
    wandb_entity: str | None = key(None, "Weights & Biases entity")
    wandb_silent: bool = key(False, "quiet Weights & Biases")
    enable_wandb: bool = key(False, "log to Weights & Biases")
    save_csv: bool = key(True, "write eval.csv and train.csv")
    tensorboard: bool = key(True, "write TensorBoard event files")
    display: str = key(
        "auto",
        "what the terminal shows: a live table, lines, or nothing; auto is live in a terminal",
        choices=("auto", "live", "lines", "none"),
    )

    key = partial(_key, "misc")
    save_video: bool = key(False, "record the first episode of every evaluation")
    save_agent: bool = key(True, "write checkpoints")
    checkpoint_minutes: float | None = key(
        10.0, "minutes between checkpoints; none writes them at evaluations and at the end only", low=0
    )
    keep_checkpoints: int = key(2, "newest checkpoints that are kept, the best one aside", low=1)
    resume: str | None = key(
        None, "auto goes on with the run in this run's folder, if there is one", choices=(None, "auto")
    )
    seed: int = key(1, "seed of everything random", low=0, high=2**32 - 1)
    work_dir: str | None = key(None, "run folder; default runs/TASK/EXP_NAME/SEED")

    key = partial(_key, "from the environment")
    obs_shape: Mapping[str, tuple[int, ...]] | None = key(None, "shape per kind of observation")
    action_dim: int | None = key(None, "width of the action", low=1)
    episode_length: int | None = key(None, "decisions per episode", low=1)
    seed_steps: int | None = key(
        None, "decisions before learning, random unless weights are given; default max(1000, 5 episodes)", low=1
    )
    multitask: bool = key(False, "one model for several tasks")
    tasks: tuple[str, ...] = key((), "names of the tasks of one multi-task model, whose own name is `task`")
    action_dims: tuple[int, ...] = key((), "action width per task (multi-task)")
    episode_lengths: tuple[int, ...] = key((), "decisions per episode per task (multi-task)")

    key = partial(_key, "of this project")
    num_envs: int = key(1, "environments stepped side by side", low=1)
    env_workers: int | None = key(
        None, "processes that step them, 0 for none; none takes 0 for one environment, else at most one a core", low=0
    )
    env_kwargs: Mapping[str, Any] | None = key(None, "settings of the environment itself, as in env.gain=2")
    on_env_error: str = key(
        "stop",
        "where an environment raises or gives NaN: stop the run, or drop the episode and make it anew",
        choices=("stop", "drop"),
    )
    overlap: bool | None = key(
        None, "step environments while updates run, which changes no number; none does so on a GPU only"
    )
    utd: float = key(1.0, "updates per decision", low=0)
    device: str = key("auto", "torch device: auto, cpu, cuda, cuda:1, ...")
    num_threads: int | None = key(None, "CPU threads of torch; none takes the cores idle at the start", low=1)
    rank_timeout: float = key(
        10.0, "minutes that processes of torchrun wait for each other until the run ends", low=0, open_low=True
    )
    precision: str = key(
        "auto",
        "products: float32 exact, tf32 on a GPU (auto there), bfloat16 by kernels (a CPU: AMX or AVX512-BF16)",
        choices=("auto", "float32", "tf32", "bfloat16"),
    )
    backend: str = key(
        "auto",
        "implementation of the ops: kernels of a GPU (triton) or a CPU (cpu), or torch",
        choices=("auto", "torch", "triton", "cpu"),
    )
    init: str | None = key(None, "checkpoint to fine-tune from: weights that fit are taken, the rest begins anew")
    init_task: str | None = key(None, "task of init whose embedding a new one begins with; none: the mean of all")
    freeze: str | None = key(
        None, "parts of the world model that do not learn", choices=(None, "encoder", "encoder+dynamics")
    )
    mix: float | None = key(
        None, "share of each batch from data_dir in online training; none trains on the data alone", low=0, high=1
    )
    task_grad_leak: bool = key(
        True, "multi-task: the policy loss's task-embedding gradient enters the next world update, as official"
    )
    del key

    def __post_init__(self) -> None:
        fields = {f.name: f for f in dataclasses.fields(self)}
        size = checked(fields["model_size"], self.model_size)
        dims: dict[str, Any] = DEFAULT_DIMS if size is None else DEFAULT_DIMS | MODEL_SIZES[size]
        known: dict[str, Any] = {}
        if isinstance(self.task, str) and self.task in TASK_SETS:
            dims = dims | set_dims(self.task, size)
            known = set_keys(self.task, size)
        elif isinstance(self.tasks, (tuple, list)) and self.tasks and not self.env_kwargs:  # which may change sizes
            known = keys_of(tuple(self.tasks), self.task, size)
        known = {k: v for k, v in known.items() if not _given(getattr(self, k))}
        if self.obs == "rgb":
            dims = dims | self._pixel_dims(dims["latent_dim"])
        for name, f in fields.items():
            value = known.get(name, getattr(self, name))
            object.__setattr__(self, name, checked(f, dims.get(name) if value is None else value))
        check_relations(self)

    def _pixel_dims(self, latent_dim: int) -> dict[str, Any]:
        """Return the latent's width or the pixel encoder's channels, whichever follows from the other."""
        width, channels = plain(self.latent_dim), plain(self.num_channels)
        if width is None and isinstance(channels, (int, float)):
            return dict(latent_dim=CHANNEL_LATENTS * channels)
        width = latent_dim if width is None else width
        follows = isinstance(width, (int, float)) and width >= CHANNEL_LATENTS
        return dict(num_channels=width // CHANNEL_LATENTS) if follows else {}

    @property
    def effective_iterations(self) -> int:
        """MPPI iterations actually run: two more for large action spaces (official heuristic)."""
        return self.iterations + 2 * int(self.need("action_dim") >= LARGE_ACTION_DIM)

    @property
    def has_weights(self) -> bool:
        """Whether a run begins with weights that have learned, so that its agent plays from the start."""
        return self.checkpoint is not None or self.init is not None

    @property
    def discounts(self) -> list[float]:
        """Discount of each task of a multi-task model, or of the one task."""
        lengths = self.episode_lengths if self.multitask else (self.need("episode_length"),)
        return [self.discount(n) for n in lengths]

    @property
    def bin_size(self) -> float:
        """Width of a bin in symlog space."""
        return (self.vmax - self.vmin) / max(self.num_bins - 1, 1)

    @property
    def num_logits(self) -> int:
        """Outputs of the reward head and of each critic."""
        return max(self.num_bins, 1)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of an observation of the kind that the agent takes."""
        return tuple(self.need("obs_shape")[self.obs])

    def need(self, key: str) -> Any:
        """Return the value of a key that the environment gives.

        Raises:
            ConfigError: it is not set.
        """
        value = getattr(self, key)
        if value is None:
            raise ConfigError(
                f"config key {key!r} is not set: it comes from the environment; complete the config by "
                "Config.with_env(env), or with_env(obs_shape, action_dim, episode_length)"
            )
        return value

    def discount(self, episode_length: int) -> float:
        """Return the discount for episodes of this many decisions: clip((T/d - 1)/(T/d)) (paper, Appendix)."""
        frac = episode_length / self.discount_denom
        return min(max((frac - 1) / frac, self.discount_min), self.discount_max)

    def with_env(
        self, obs_shape: Mapping[str, tuple[int, ...]] | Any, action_dim: int = 0, episode_length: int = 0
    ) -> Config:
        """Return this config, completed by what an environment knows.

        obs_shape: shape per kind of observation; or, alone, the environment itself: one with `obs_shape`,
            `action_dim` and `max_episode_steps`, or a Gymnasium one, vectorised or not.

        Raises:
            ConfigError: an environment that does not tell, with what is missing, or has what no agent can be made of.
        """
        if not isinstance(obs_shape, Mapping):
            obs_shape, action_dim, episode_length = sizes_of(obs_shape, self.obs, self.episode_length)
        cfg = self.replace(obs_shape=obs_shape, action_dim=action_dim, episode_length=episode_length)
        return cfg.replace(seed_steps=self.seed_steps or max(1000, 5 * cfg.need("episode_length")))

    def with_tasks(self, sizes: Sequence[tuple[int, int, int]] = ()) -> Config:
        """Return the config of a multi-task model, completed by the sizes of its tasks' environments.

        Seeding takes five episodes of each task, as it takes five of a single one.

        sizes: width of observation and action and decisions per episode of each of `tasks`, in their order; none
            where they are known already.
        """
        cfg = self
        if sizes:
            widths, actions, lengths = zip(*sizes, strict=True)
            cfg = self.replace(
                multitask=True,
                obs_shape={"state": (max(widths),)},
                action_dims=actions,
                action_dim=max(actions),
                episode_lengths=lengths,
                episode_length=max(lengths),
                task_dim=self.task_dim or task_embedding_dim(self.task, self.model_size),
            )
        return cfg.replace(seed_steps=self.seed_steps or max(1000, 5 * sum(cfg.episode_lengths)))

    def of_task(self, name: str) -> Config:
        """Return the config of one of `tasks` alone, without what its environment fills in but for its length."""
        length = self.episode_lengths[self.tasks.index(name)] if self.multitask else None
        return self.replace(task=name, tasks=(), seed_steps=None, episode_length=length)

    def replace(self, **changes: Any) -> Config:
        """Return a copy with some keys changed, validated again.

        Other keys keep their values, except that another `model_size` brings its own dims, that a set of tasks
        (mt30, mt80) or other `tasks` bring their own keys, and that `latent_dim` and `num_channels` follow each other
        where obs=rgb.
        """
        _check_known(changes)
        task, resized = changes.get("task", self.task), changes.get("model_size", self.model_size) != self.model_size
        if resized:
            changes = {**dict.fromkeys(DEFAULT_DIMS), **changes}
        leaves = task != self.task and self.multitask and self.task in TASK_SETS
        if leaves or ("tasks" in changes and changes["tasks"] not in (self.tasks, [*self.tasks])):
            left = {f.name: f.default for f in dataclasses.fields(self) if f.name in set_keys("mt30", None)}
            changes = {**left, **changes}
        elif resized and self.task_dim == task_embedding_dim(self.task, self.model_size):
            changes = {"task_dim": 0, **changes}
        pixels, given = changes.get("obs", self.obs) == "rgb", {"latent_dim", "num_channels"} & changes.keys()
        if pixels and len(given) == 1:
            changes = {"latent_dim": None, "num_channels": None, **changes}
        elif pixels and self.obs != "rgb":
            changes = {"num_channels": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON: the inverse of `from_dict`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def key_names(cls) -> list[str]:
        """List all config keys."""
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Make a config of keys and values; an unknown key raises `ConfigError` with the nearest one.

        Keys of older versions, which files may have, are left out.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"config: got {kind_of(values)}, allowed: a dict of keys and values")
        values = {k: v for k, v in values.items() if k not in _RETIRED}
        _check_known(values)
        return cls(**values)

    @classmethod
    def from_official(cls, cfg: Any) -> Config:
        """Make a config of the official code's `cfg` (a dataclass, an OmegaConf or any object with attributes).

        Keys without a meaning here are left out, unset ones (`???`) take the default.

        Raises:
            ConfigError: no such object, or a plain dict with a key that seems to be another one mistyped.
        """
        if isinstance(cfg, Config):
            return cfg
        if isinstance(cfg, Mapping):
            get = cfg.get
            if isinstance(cfg, dict):  # written by hand; an OmegaConf has keys of whoever extended it
                absent = [k for k in cls.key_names() if k not in cfg]  # one that is there is not the one meant
                _check_known([k for k in cfg if k not in _OFFICIAL_ONLY and did_you_mean(str(k), absent)])
        elif any(hasattr(cfg, key) for key in ("task", "obs", "obs_shape")):
            get = partial(getattr, cfg)
        else:
            raise ConfigError(f"cfg: got {kind_of(cfg)}, allowed: a Config, the official cfg, a dict of its keys")
        values: dict[str, Any] = {}
        for key in cls.key_names():
            value = get(key, None)
            if value is None or (isinstance(value, str) and value == "???"):
                continue
            values[key] = value
        if not values.get("multitask", False):
            for key in ("tasks", "action_dims", "episode_lengths"):
                values.pop(key, None)
            values["task_dim"] = 0
        return cls(**values)


def _given(value: Any) -> bool:
    """Tell whether a key of a set of tasks was given; an array always is."""
    return not (value is None or (isinstance(value, (bool, int, tuple, list)) and not value))


def _check_known(keys: Iterable[Any]) -> None:
    """Raise `ConfigError` for the first that is no config key, and name the nearest one."""
    known = Config.key_names()
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown config key {key!r}.{did_you_mean(str(key), known)}")
