"""The `key=value` grammar of all commands: words of a command line in, config values out.

It is the official one, Hydra's as far as `train.py` of the official code needs it. Nothing here
knows a terminal, so that programs without one (`benchmarks/gpu/soak.py`) read their words with it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tdmpc2_fast.config import DEFAULT_DIMS, MODEL_SIZES, Config
from tdmpc2_fast.config_values import checked, describe_range
from tdmpc2_fast.errors import ConfigError, did_you_mean, nearest
from tdmpc2_fast.export import DEFAULT_OPSET, OPSETS

from . import task_sets

_MULTI_TASK_BATCH = 1024
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        task="cheetah-run",
        model_size=1,
        num_samples=96,
        num_elites=12,
        batch_size=128,
        seed_steps=1000,
        steps=4500,
        eval_freq=2500,
        eval_episodes=1,
        exp_name="quick",
        save_video=True,
    ),
    **{
        f"{size}m": dict(model_size=size) | (dict(batch_size=_MULTI_TASK_BATCH) if size >= 19 else {})
        for size in MODEL_SIZES
    },
}
"""Named settings; keys given beside a preset win over it.

`quick` is a look at learning in minutes, a tenth of them for its three evaluations. The sizes from 19M on come
from the official multi-task runs and have their batch; `model_size=19` alone leaves it at 256.
"""

FILLED_IN = ("obs_shape", "action_dim", "multitask", "tasks", "action_dims", "episode_lengths")
"""Keys of `Config` that only an environment sets."""

_FROM_ENV = "it comes from the environment"
NOT_NEEDED: dict[str, str] = {
    "task_title": "it is a title made from the task's name",
    "multitask": "it follows from the task",
    "tasks": "they follow from the task; of several, task=A,B as=NAME",
    "obs_shape": _FROM_ENV,
    "action_dim": _FROM_ENV,
    "obs_shapes": "they come from the environments of a multi-task run",
    "action_dims": "they come from the environments of a multi-task run",
    "episode_lengths": "they come from the environments of a multi-task run",
    "bin_size": "it follows from vmin, vmax and num_bins",
    "compile": "the kernels, of a GPU or a CPU, are faster than what torch.compile makes",
    "cudagraphs": "the Triton backend always replays CUDA graphs; backend= chooses",
}
"""Official keys, of any generation, that nothing here reads, and why."""

RENAMED = {"wandb": "enable_wandb", "terminated_coef": "termination_coef"}
"""Other names of keys: a short one, and one of an older generation of the official code."""

_SETTING = "env."
_QUOTED = re.compile(r"""(['"])(.*)\1""", re.DOTALL)
_SUM = re.compile(r"(\d+)([-+*/])(\d+)")
_SUMS: dict[str, Callable[[Any, Any], Any]]
_SUMS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _option(
    default: Any, help: str, low: int | None = None, high: int | None = None, choices: tuple[Any, ...] | None = None
) -> Any:
    meta = dict(group="command line", help=help, low=low, high=high, open_low=False, choices=choices)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Options:
    """Keys of the command `train` itself, which are no part of a run's config."""

    preset: str | None = _option(None, "settings by name; keys given beside it win", choices=(None, *PRESETS))
    as_: str | None = _option(None, "one model for all tasks of task=A,B,..., by this name; else they are a sweep")
    dry_run: bool = _option(False, "print the command of every run of a sweep and run none")
    job: int | None = _option(None, "run only this one of a sweep's runs, counted from 1", low=1)
    debug: bool = _option(False, "show where an error came from, as TDMPC2_DEBUG=1 does for every command")


Options.__dataclass_fields__["as_"].name = "as"  # which is no name that a field can be given


@dataclass(frozen=True)
class PlotOptions:
    """Keys of the command `plot`."""

    out: str | None = _option(None, "the picture, .png or .svg; none writes both: RUN/curve.*, for several curves.*")
    reference: str | None = _option(None, "folder of published curves to draw beside them: METHOD/TASK.csv")
    max_step: float | None = _option(None, "environment steps at which the axis ends", low=1)


@dataclass(frozen=True)
class EvalOptions:
    """Keys of the command `eval`, beside those of a config."""

    tasks: str | None = _option(None, "of a multi-task model, those to play, as in walker-walk,cup-catch; none: all")


@dataclass(frozen=True)
class PlanOptions:
    """Keys of the command `plan`, beside those of a config."""

    tasks: str | None = _option(None, "of a multi-task model, the one to play")

    decision: int | None = _option(
        None, "decisions of the episode that come before the one drawn; none: 50, or what a shorter episode has", low=0
    )
    out: str | None = _option(None, "the picture, .png or .svg; none writes CHECKPOINT-plan.png")


@dataclass(frozen=True)
class TasksOptions:
    """Keys of the command `tasks`."""

    check: bool = _option(False, "play an episode of each that runs here, and say what a decision takes; or --check")


@dataclass(frozen=True)
class SuitesOptions:
    """Keys of the command `suites`."""

    python: str | None = _option(None, "interpreter to make the suite's of; none: the one that this runs in")
    installer: str | None = _option(None, "none takes uv where it is installed", choices=(None, "uv", "pip"))


@dataclass(frozen=True)
class ExportOptions:
    """Keys of the command `export`."""

    format: str = _option(
        "onnx",
        "ONNX, torch.export's .pt2, official weights, or small ones for acting",
        choices=("onnx", "torch", "official", "small"),
    )
    out: str | None = _option(None, "a folder, or the file of the plan; none writes beside the checkpoint")
    opset: int | None = _option(None, f"of ONNX; none: {DEFAULT_OPSET}", low=OPSETS[0], high=OPSETS[1])
    compiled: bool = _option(False, "with format=torch: compiled for this machine by AOTInductor, which takes minutes")


@dataclass(frozen=True)
class CollectOptions:
    """Keys of the command `collect`, beside those of a config."""

    out: str | None = _option(None, "folder of the data set; what is in it stays")
    episodes: int | None = _option(
        None, "episodes of each source and task that the set is to have; none: 100, or all of a replay", low=1
    )
    noise: bool = _option(False, "let agents explore as in training")
    replay: bool = _option(False, "take the episodes in the replay of a run, and play none")


@dataclass(frozen=True)
class DataOptions:
    """Keys of the command `data`."""

    out: str | None = _option(None, "with convert: folder of the new data set")
    tasks: str | None = _option(
        None,
        "with convert: mt30, mt80 or names in the order of official files' task numbers; of Minari, the task's name",
    )


CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in FILLED_IN}
OPTION_FIELDS = {f.name: f for f in dataclasses.fields(Options)}
_KNOWN = [
    *(k for k in CONFIG_FIELDS if k != "env_kwargs"),
    f"{_SETTING}KEY",
    *OPTION_FIELDS,
    *RENAMED,
    "disable_wandb",
    *NOT_NEEDED,
]


def to_stderr(text: str) -> None:
    """Print a note beside a command's output."""
    print(f"note: {text}", file=sys.stderr)


def parse(words: Sequence[str], note: Callable[[str], object] = to_stderr, presets: bool = True) -> dict[str, Any]:
    """Return the values of `key=value` words for `Config.from_dict`; a bad word raises `ConfigError`.

    Official keys that have no meaning here go to `note` with the reason; `???` leaves a key at
    its default. `presets` allows `preset=NAME`, and `as=NAME` with the tasks of one model.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    preset: dict[str, Any] = {}
    name: str | None = None
    for i, word in enumerate(words):
        key, text = pair(word, words[i + 1 :])
        if key == "disable_wandb":
            key, text = "enable_wandb", {"true": "false", "false": "true"}.get(text.lower(), text)
        key = RENAMED.get(key, key)
        if key in seen:
            raise ConfigError(f"config key {key!r}: given twice, allowed: once")
        seen.add(key)
        if text == "???":
            continue
        if key.startswith(_SETTING):
            _put(values.setdefault("env_kwargs", {}), key, text)
            continue
        if key in NOT_NEEDED:
            note(f"{key} has no effect: {NOT_NEEDED[key]}")
        elif key == "preset" and presets:
            preset = PRESETS.get(value_of(OPTION_FIELDS[key], text), {})
        elif key == "as" and presets:
            name = value_of(OPTION_FIELDS[key], text)
        elif key == "env_kwargs" or key.startswith("env_kwargs."):
            name = key.partition(".")[2] or "KEY"
            raise ConfigError(f"config key {key!r}: allowed: one by one, env.{name}=VALUE")
        elif key in CONFIG_FIELDS:
            values[key] = value_of(CONFIG_FIELDS[key], text)
        elif key in OPTION_FIELDS:
            raise ConfigError(f"config key {key!r}: belongs to the command train, and is not allowed here")
        else:
            hint = did_you_mean(key, _KNOWN) or " tdmpc2-fast train --help lists the keys."
            raise ConfigError(f"unknown config key {key!r}.{hint}{_range_of_nearest(key)}")
    values = {**preset, **values}
    if presets and (name is not None or task_sets.is_file(str(values.get("task")))):
        values |= task_sets.one_model(values.get("task", Config.task), name)
    return values


def settings(env_kwargs: Mapping[str, Any] | None, prefix: str = "env") -> dict[str, Any]:
    """Return the settings of an environment by the keys a person gives them with."""
    found: dict[str, Any] = {}
    for name, value in (env_kwargs or {}).items():
        key = f"{prefix}.{name}"
        found.update(settings(value, key) if isinstance(value, dict) and value else {key: value})
    return found


def _put(values: dict[str, Any], key: str, text: str) -> None:
    """Put a setting of the environment, `env.KEY` or `env.KEY.KEY`, into `values`."""
    *path, last = key.removeprefix(_SETTING).split(".")
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"config key {key!r}: {name!r} has a value of its own already, allowed: one of the two")
    if not (last and all(path)) or last in values:
        raise ConfigError(
            f"config key {key!r}: allowed: env.KEY=VALUE, every KEY once, with a name between any two dots"
        )
    values[last] = _setting(key, text)


def _setting(key: str, text: str) -> Any:
    """Return a setting's value: a number, true, false, none, a list or dict; else the text as it stands."""
    quoted = _QUOTED.fullmatch(text)
    if quoted:
        return quoted[2]
    text = text.strip()
    named = {"true": True, "false": False, "none": None, "null": None, "": None}
    if text.lower() in named:
        return named[text.lower()]
    if re.fullmatch(r"[-+]?(inf|infinity|nan)", text, re.IGNORECASE):
        raise ConfigError(f"config key {key!r}: got {text}, allowed: finite numbers")
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    if text.startswith("[") and text.endswith("]"):  # of bare words, as Hydra has them
        return [_setting(key, word) for word in text[1:-1].split(",")]
    if text.startswith(("[", "{")):
        raise ConfigError(f"config key {key!r}: got {text!r}, allowed: a list or dict as JSON or Python writes it")
    return text


T = TypeVar(
    "T",
    Options,
    PlotOptions,
    EvalOptions,
    PlanOptions,
    ExportOptions,
    TasksOptions,
    SuitesOptions,
    CollectOptions,
    DataOptions,
)


def options(words: Sequence[str], kind: type[T]) -> tuple[T, list[str]]:
    """Return a command's options, read from the words, and the words that are left.

    `plot`, `plan` and `export` take theirs with dashes, too: `--reference DIR`. `preset` stays among the words, since a
    sweep may go over it, and so does `as`, which is a run's. Hydra's `--multirun` is
    dropped: several values are always a sweep here.
    """
    known = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("preset", "as")}
    found: dict[str, Any] = {}
    rest = []
    for word in words if kind is Options else _undashed(words, known):
        key, equals, text = word.partition("=")
        if key in known and equals:
            if key in found:
                raise ConfigError(f"config key {key!r}: given twice, allowed: once")
            found[key] = checked(known[key], value_of(known[key], text))
        elif word not in ("-m", "--multirun"):
            rest.append(word)
    return kind(**found), rest


def _undashed(words: Sequence[str], known: Collection[str]) -> Iterator[str]:
    """Yield the words, with `--out FILE` and `--out=FILE` as `out=FILE` for options that are no config keys."""
    left = iter(words)
    for word in left:
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in known:
            yield word
            continue
        value = text if equals else next(left, None)
        if value is None:
            raise ConfigError(f"argument {word!r}: allowed: {name}=VALUE, or {word} VALUE")
        yield f"{name}={value}"


def arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the words into arguments, such as a path, and those meant as `key=value`."""
    meant = [bool(re.match(r"[-+~]|\w+(\.\w+)*=|hydra[./]", w)) for w in words]
    return [w for w, m in zip(words, meant, strict=True) if not m], [w for w, m in zip(words, meant, strict=True) if m]


def pair(word: str, following: Sequence[str] = ()) -> tuple[str, str]:
    """Split a word `key=value`, `+key=value` or `++key=value` into its key and text.

    A word in another grammar raises `ConfigError` with the right spelling; `following` are the
    words after it.
    """
    key, equals, text = word.partition("=")
    key = key.lstrip("+")
    if key.startswith("-"):
        name = key.lstrip("-").replace("-", "_")
        shown, value = word, text
        if not equals:
            boolean = name in CONFIG_FIELDS and str(CONFIG_FIELDS[name].type).startswith("bool")
            takes = bool(following) and not boolean and not re.match(r"-\D|\+*\w+=", following[0])
            shown, value = (f"{word} {following[0]}", following[0]) if takes else (word, "true" if boolean else "VALUE")
        hint = (
            "" if name in _KNOWN or name.startswith(_SETTING) else f" {name!r} is no key.{did_you_mean(name, _KNOWN)}"
        )
        raise ConfigError(f"argument {shown!r}: keys have no dashes, allowed: {name}={value}.{hint}")
    if key.startswith("~"):
        raise ConfigError(f"argument {word!r}: nothing can be removed from the config, allowed: KEY=VALUE, or KEY=none")
    if re.match(r"hydra[./]|hydra$", key):
        raise ConfigError(
            f"argument {word!r}: Hydra does not run here. work_dir=FOLDER sets the run folder, several values "
            "(seed=1,2,3) are a sweep, and docs/sweeps.md has the recipe for SLURM"
        )
    if not equals:
        if key in _KNOWN or key.startswith(_SETTING):
            raise ConfigError(f"argument {word!r}: allowed: {key}=VALUE")
        hint = f" Did you mean task={word}?" if "-" in word else did_you_mean(key, _KNOWN)
        raise ConfigError(f"argument {word!r}: allowed: key=value.{hint}")
    return key, text


def value_of(f: dataclasses.Field[Any], text: str) -> Any:
    """Read the text as a value of the field's type, or raise `ConfigError`."""
    quoted = _QUOTED.fullmatch(text)
    text, plain = (quoted[2], False) if quoted else (text.strip(), True)
    kind, choices = str(f.type), f.metadata["choices"]
    if text.lower() in ("none", "null", "") and "None" in kind:
        return None
    try:
        if plain and text.startswith("["):
            raise ValueError
        if kind.startswith("bool"):
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith(("int", "float")):
            return _number(text, kind.startswith("int"))
        if f.name in OPTION_FIELDS and choices is not None and text not in choices:
            raise ValueError
    except (KeyError, ValueError, ZeroDivisionError) as e:
        close = did_you_mean(text, map(str, choices)) if choices and kind.startswith("str") else ""
        raise ConfigError(f"config key {f.name!r}: got {text!r}, allowed: {describe_range(f)}.{close}") from e
    return text


def _range_of_nearest(key: str) -> str:
    """Say what the key that was probably meant may hold."""
    f = next((CONFIG_FIELDS.get(k) for k in nearest(key, _KNOWN, 1)), None)
    return "" if f is None else f" {f.name}: {describe_range(f)}."


def _number(text: str, whole: bool) -> int | float:
    """Read a number, or one operation on two as in the official code (`steps=7*1000000`)."""
    if found := _SUM.fullmatch(text):
        return float(_SUMS[found[2]](int(found[1]), int(found[3])))
    return int(text) if whole and text.lstrip("+-").replace("_", "").isdigit() else float(text)


def groups(own: type[Any] | None, config: bool = True) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the keys that a command takes by their headings: its own, then those of `Config` that a person can set."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for f in (*(dataclasses.fields(own) if own else ()), *(CONFIG_FIELDS.values() if config else ())):
        found.setdefault(f.metadata["group"], []).append(f)
    return found


def default_text(f: dataclasses.Field[Any]) -> str:
    """Return the default as a person would write it after `key=`."""
    default = DEFAULT_DIMS.get(f.name, f.default)
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return f"{default:_}" if isinstance(default, int) else str(default)
