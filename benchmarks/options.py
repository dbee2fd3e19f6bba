"""The options of a benchmark run: `key=value` words, checked before anything is measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from tdmpc2_fast import Config
from tdmpc2_fast.config import MODEL_SIZES
from tdmpc2_fast.errors import CheckpointError, ConfigError, did_you_mean
from tdmpc2_fast.kernels.cpu.build import bfloat16
from tdmpc2_fast.kernels.device.launch import PRECISIONS, interpreting
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.runtime.backend import resolve_device

OBS_DIM = 24
T = TypeVar("T")


def _key(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Keys of `tdmpc2-fast bench`; lists are separated by commas."""

    size: tuple[int, ...] = _key("model sizes in millions of parameters", (5,))
    envs: tuple[int, ...] = _key("environments planned for at once", (1,))
    actions: tuple[int, ...] = _key("action dimensions", (6,))
    batch: tuple[int, ...] = _key("batch sizes of updates", (256,))
    precision: tuple[str, ...] = _key("of products; default: bfloat16, with tf32 on a GPU and float32 on a CPU", ())
    device: str = _key("auto, cpu, cuda or cuda:N", "auto")
    compiled: bool = _key("measure torch.compile baselines, which take a minute or two to compile", True)
    official: str | None = _key("checkout of the official repository to measure, too")
    jax: str | None = _key("checkout of the JAX port (tdmpc2-jax) to measure, too")
    checkpoint: str | None = _key("plan with these weights, and from their task's first observations")
    task: str = _key("environment of the environment and loop suites", "walker-walk")
    repeats: int = _key("rounds of a measurement", 20)
    budget: float = _key("seconds of a measurement, after which its rounds end", 20.0)
    threads: int | None = _key("CPU threads; default: as many as cores are idle now")
    seed: int = _key("of weights, inputs and draws", 0)
    out: str = _key("folder for results; files there are never overwritten", "runs/bench")

    def __post_init__(self) -> None:
        for key in ("size", "envs", "actions", "batch"):
            found = getattr(self, key)
            _need(found and min(found) >= 1, key, found, "integers of at least 1")
        for size in self.size:
            _need(size in MODEL_SIZES, "size", size, ", ".join(map(str, MODEL_SIZES)))
        for x in self.precision:
            _need(x in PRECISIONS, "precision", x, ", ".join(PRECISIONS))
        if self.repeats < 3 or not 0 < self.budget < float("inf"):
            raise ConfigError(
                f"bench keys 'repeats' and 'budget': got {self.repeats} and {self.budget}, allowed: at least 3, above 0"
            )
        _need(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        checkouts = dict(official=("the official repository", "tdmpc2"), jax=("tdmpc2-jax", "tdmpc2_jax"))
        for key, (name, package) in checkouts.items():
            folder, file = getattr(self, key), f"{package}/tdmpc2.py"
            there = folder is None or Path(folder, file).is_file()
            _need(there, key, folder, f"a checkout of {name}, with {file} in it")
        for x in self.precisions:
            fine = self.torch_device.type != "cpu" or interpreting() or x in _of_this_cpu()
            _need(fine, "precision", x, ", ".join(_of_this_cpu()), " on this CPU")

    @property
    def torch_device(self) -> torch.device:
        """The device measured."""
        return resolve_device(self.device)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions asked for, or the device's own."""
        if self.precision:
            return self.precision
        return ("tf32", "bfloat16") if self.torch_device.type == "cuda" else _of_this_cpu()

    @cached_property
    def trained(self) -> tuple[dict[str, Any], Config]:
        """The weights of the checkpoint, and their config.

        Raises:
            CheckpointError: as `checkpoint.read`, or it has no config or is of several tasks.
        """
        assert self.checkpoint is not None
        state, cfg = checkpoint.read(self.checkpoint)
        if cfg is None or cfg.multitask or not _published(cfg):
            what = "no config" if cfg is None else "several tasks" if cfg.multitask else "dims of its own"
            allowed = "one of ours, of one task and a published size"
            raise CheckpointError(f"bench key 'checkpoint': {self.checkpoint!r} has {what}, allowed: {allowed}")
        return state, cfg

    def keys(self, size: int, **changes: Any) -> dict[str, Any]:
        """Return the config keys of a published size."""
        return dict(model_size=size, device=str(self.torch_device), seed=self.seed) | changes

    def config(self, size: int, actions: int, **changes: Any) -> Config:
        """Return a config completed for an environment that does not exist, or that of the checkpoint."""
        if self.checkpoint is not None:
            return self.trained[1].replace(device=str(self.torch_device), seed=self.seed, **changes)
        return Config.from_dict(self.keys(size, **changes)).with_env({"state": (OBS_DIM,)}, actions, 500)


def _published(cfg: Config) -> bool:
    """Tell whether a config has the dims of its model size."""
    dims = MODEL_SIZES.get(cfg.model_size or 0)
    return dims is not None and all(getattr(cfg, k) == v for k, v in dims.items())


def _of_this_cpu() -> tuple[str, ...]:
    """Return the precisions that its kernels have."""
    return ("float32", "bfloat16") if bfloat16() else ("float32",)


def _need(fine: object, key: str, got: object, allowed: str, where: str = "") -> None:
    if not fine:
        raise ConfigError(f"bench key {key!r}: got {got!r}, allowed{where}: {allowed}")


def parse(words: Sequence[str]) -> Options:
    """Return the options that `key=value` words ask for; a bad one raises `ConfigError`."""
    fields = {f.name: f for f in dataclasses.fields(Options)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"argument {word!r}: allowed: key=value, or a suite")
        if key not in fields:
            raise ConfigError(f"unknown bench key {key!r}.{did_you_mean(key, fields)}")
        values[key] = _value(key, str(fields[key].type), text)
    if "checkpoint" in values:
        for key in ("size", "actions"):
            _need(key not in values, key, values.get(key), "none beside checkpoint=, which has its own")
        cfg = Options(**values).trained[1]
        values |= dict(size=(cfg.model_size,), actions=(cfg.action_dim,))
    return Options(**values)


_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "tuple[int, ...]": (lambda text: tuple(int(x) for x in text.split(",")), "integers separated by commas"),
    "tuple[str, ...]": (lambda text: tuple(text.split(",")), ""),
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "int": (int, "an integer"),
    "int | None": (int, "an integer"),
    "float": (float, "a number"),
}
"""How a field of this type is read, and what is allowed; others are text."""


def _value(key: str, kind: str, text: str) -> Any:
    read, allowed = _READ.get(kind, (str, ""))
    try:
        value = read(text)
    except (KeyError, ValueError) as e:
        raise ConfigError(f"bench key {key!r}: got {text!r}, allowed: {allowed}") from e
    return str(Path(value).expanduser()) if key in ("official", "jax", "checkpoint", "out") else value


def describe() -> str:
    """Return a line for every key, with its default and its meaning."""
    lines = []
    for f in dataclasses.fields(Options):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default).lower()
        lines.append(f"  {f.name:10} {default:12} {f.metadata['help']}")
    return "\n".join(lines)


def each(make: Callable[..., T], options: Options, *keys: str) -> Iterator[Callable[[], T]]:
    """Yield `make`, given the options and each combination of their values of these keys."""
    for values in itertools.product(*(getattr(options, key) for key in keys)):
        yield partial(make, options, *values)


def backend_of(options: Options) -> str:
    """Return `auto`, or `triton` where kernels are interpreted, so that their set-up is tried without a GPU."""
    return "triton" if interpreting() and options.torch_device.type == "cpu" else "auto"
