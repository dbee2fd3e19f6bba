"""What a benchmark run is asked for: `key=value` words, checked before anything is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tdmpc2_fast import Config
from tdmpc2_fast.config import MODEL_SIZES
from tdmpc2_fast.errors import ConfigError, did_you_mean
from tdmpc2_fast.kernels.device.launch import PRECISIONS, interpreting
from tdmpc2_fast.runtime.backend import resolve_device

_FLAGS = {"true": True, "false": False}


OBS_DIM = 24


def _key(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Keys of `tdmpc2-fast bench`; lists are separated by commas."""

    size: tuple[int, ...] = _key("model sizes in millions of parameters", (5,))
    envs: tuple[int, ...] = _key("environments planned for at once", (1,))
    actions: tuple[int, ...] = _key("action dimensions", (6,))
    batch: tuple[int, ...] = _key("batch sizes of updates", (256,))
    precision: tuple[str, ...] = _key("of products; default: float32 on a CPU, tf32 and bfloat16 on a GPU", ())
    device: str = _key("auto, cpu, cuda or cuda:N", "auto")
    compiled: bool = _key("measure torch.compile baselines, which take a minute or two to compile", True)
    official: str | None = _key("checkout of the official repository to measure, too")
    jax: str | None = _key("checkout of the JAX port (tdmpc2-jax) to measure, too")
    task: str = _key("environment of the environment and loop suites", "walker-walk")
    repeats: int = _key("rounds of a measurement", 20)
    budget: float = _key("seconds of a measurement, after which its rounds end", 20.0)
    threads: int | None = _key("CPU threads; default: as many as cores are idle now")
    seed: int = _key("of weights, inputs and draws", 0)
    out: str = _key("folder for results; files there are never overwritten", "runs/bench")

    def __post_init__(self) -> None:
        for key in ("size", "envs", "actions", "batch"):
            low = [x for x in getattr(self, key) if x < 1]
            if low or not getattr(self, key):
                raise ConfigError(f"bench key {key!r}: got {getattr(self, key)}, allowed: integers of at least 1")
        wrong = [x for x in self.size if x not in MODEL_SIZES]
        if wrong:
            raise ConfigError(f"bench key 'size': got {wrong[0]}, allowed: {', '.join(map(str, MODEL_SIZES))}")
        for x in self.precision:
            if x not in PRECISIONS:
                raise ConfigError(f"bench key 'precision': got {x!r}, allowed: {', '.join(PRECISIONS)}")
        if self.repeats < 3 or not 0 < self.budget < float("inf"):
            raise ConfigError(
                f"bench keys 'repeats' and 'budget': got {self.repeats} and {self.budget}, allowed: at least 3, above 0"
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"bench key 'threads': got {self.threads}, allowed: at least 1")
        if self.official is not None and not Path(self.official, "tdmpc2", "tdmpc2.py").is_file():
            raise ConfigError(
                f"bench key 'official': got {self.official!r}, allowed: a checkout of the official repository, "
                "with tdmpc2/tdmpc2.py in it"
            )
        if self.jax is not None and not Path(self.jax, "tdmpc2_jax", "tdmpc2.py").is_file():
            raise ConfigError(
                f"bench key 'jax': got {self.jax!r}, allowed: a checkout of tdmpc2-jax, with tdmpc2_jax/tdmpc2.py in it"
            )
        for x in self.precisions:
            # The interpreter computes the kernels' tf32 and bfloat16 on a CPU; plain torch does not.
            if x != "float32" and self.torch_device.type == "cpu" and not interpreting():
                raise ConfigError(f"bench key 'precision': got {x!r}, allowed on a CPU: float32")

    @property
    def torch_device(self) -> torch.device:
        """The device measured."""
        return resolve_device(self.device)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those asked for, or the device's own."""
        if self.precision:
            return self.precision
        return ("tf32", "bfloat16") if self.torch_device.type == "cuda" else ("float32",)

    def keys(self, size: int, **changes: Any) -> dict[str, Any]:
        """Config keys of a published size."""
        return dict(model_size=size, device=str(self.torch_device), seed=self.seed) | changes

    def config(self, size: int, actions: int, **changes: Any) -> Config:
        """A config completed by an environment that is not there."""
        return Config.from_dict(self.keys(size, **changes)).with_env({"state": (OBS_DIM,)}, actions, 500)


def parse(words: Sequence[str]) -> Options:
    """Options from `key=value` words; a bad one raises `ConfigError`."""
    fields = {f.name: f for f in dataclasses.fields(Options)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"argument {word!r}: allowed: key=value, or a suite")
        if key not in fields:
            raise ConfigError(f"unknown bench key {key!r}.{did_you_mean(key, fields)}")
        values[key] = _value(key, str(fields[key].type), text)
    return Options(**values)


def _value(key: str, kind: str, text: str) -> Any:
    try:
        if kind.startswith("tuple[int"):
            return tuple(int(x) for x in text.split(","))
        if kind.startswith("tuple[str"):
            return tuple(text.split(","))
        if kind == "bool":
            return _FLAGS[text.lower()]
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
    except (KeyError, ValueError) as e:
        named = dict(bool="true or false", float="a number")
        allowed = named.get(kind, "integers separated by commas" if kind.startswith("tuple") else "an integer")
        raise ConfigError(f"bench key {key!r}: got {text!r}, allowed: {allowed}") from e
    return str(Path(text).expanduser()) if key in ("official", "jax", "out") else text


def describe() -> str:
    """Every key with its default and meaning."""
    lines = []
    for f in dataclasses.fields(Options):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default).lower()
        lines.append(f"  {f.name:10} {default:12} {f.metadata['help']}")
    return "\n".join(lines)


def backend_of(options: Options) -> str:
    """`auto`; but the kernels where they are interpreted, so their set-up is tried without a GPU."""
    return "triton" if interpreting() and options.torch_device.type == "cpu" else "auto"
