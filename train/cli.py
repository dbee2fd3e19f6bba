"""The command `tdmpc2-fast`: `train` and `eval` with the official `key=value` grammar."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from tdmpc2_fast import __version__, checkpoint
from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import DEFAULT_DIMS, MODEL_SIZES, Config, describe_range
from tdmpc2_fast.errors import BackendError, CheckpointError, ConfigError, InputError, NonFiniteError, did_you_mean

from .envs import complete, make_env
from .evaluate import Evaluator
from .runs import resume, start
from .threads import choose_threads

USAGE = f"""tdmpc2-fast {__version__}

  tdmpc2-fast train task=walker-walk [key=value ...]     train an agent
  tdmpc2-fast eval checkpoint=PATH [key=value ...]       evaluate a checkpoint
  tdmpc2-fast bench [SUITE ...] [key=value ...]          measure speed against baselines
  tdmpc2-fast COMMAND --help                             every key, its default and range
"""
_COMMANDS = ("train", "eval", "bench")
_FILLED_IN = ("obs_shape", "action_dim", "multitask", "tasks", "action_dims", "episode_lengths")
_USER_ERRORS = (BackendError, CheckpointError, ConfigError, InputError, NonFiniteError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    commands = {"train": train, "eval": evaluate}
    if args and args[0] == "resume":
        return resume(args[1], parse(args[2:]))
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    for plugin in entry_points(group="tdmpc2_fast.commands", name=args[0]):
        command: Callable[[Sequence[str]], int] = plugin.load()
        return command(args[1:])
    if args[0] not in commands:
        print(f"unknown command {args[0]!r}.{did_you_mean(args[0], _COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    if any(a in ("-h", "--help") for a in args[1:]):
        print(f"{USAGE}\n{describe_keys()}")
        return 0
    try:
        return commands[args[0]](parse(args[1:]))
    except _USER_ERRORS as e:
        print(f"error: {e}", file=sys.stderr)
        return 1 if isinstance(e, (NonFiniteError, OSError)) else 2
    except KeyboardInterrupt:
        print("interrupted; checkpoints/latest in the run folder has the weights", file=sys.stderr)
        return 130


def train(values: dict[str, Any]) -> int:
    """`tdmpc2-fast train`: online training of one task."""
    return start(values)


def evaluate(values: dict[str, Any]) -> int:
    """`tdmpc2-fast eval`: episodes with a checkpoint; keys given here win over the checkpoint's."""
    path = values.get("checkpoint")
    if path is None:
        raise ConfigError("config key 'checkpoint': not given, allowed: checkpoint=PATH")
    _, saved = checkpoint.read(path)
    if saved is None and "task" not in values:
        raise ConfigError("config key 'task': an official checkpoint does not name its task; give task=NAME")
    kept = {} if saved is None else {k: v for k, v in saved.to_dict().items() if k not in _FILLED_IN}
    cfg = Config.from_dict(kept).replace(**values)
    env = make_env(cfg, cfg.seed)
    cfg = complete(cfg, env)
    env.close()
    choose_threads(cfg)
    agent = TDMPC2(cfg)
    agent.load(path)
    evaluator = Evaluator(agent)
    found = evaluator.run()
    evaluator.close()
    for i, (value, length) in enumerate(zip(found.returns, found.lengths, strict=True)):
        print(f"episode {i:3}  return {value:8.1f}  decisions {length}")
    print(f"{cfg.task}: return {found.mean_return:.1f} ± {found.std_return:.1f} over {len(found.returns)} episodes")
    return 0


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as config values; a bad one raises `ConfigError`."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"argument {word!r}: allowed: key=value")
        key = key.lstrip("+")
        if key not in fields:
            raise ConfigError(f"unknown config key {key!r}.{did_you_mean(key, fields)}")
        if key in _FILLED_IN:
            raise ConfigError(f"config key {key!r}: comes from the environment and cannot be set")
        values[key] = _value(fields[key], text)
    return values


def _value(f: dataclasses.Field[Any], text: str) -> Any:
    kind = str(f.type)
    if text.lower() in ("none", "null", "") and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith("int"):
            return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
        if kind.startswith("float"):
            return float(text)
    except (KeyError, ValueError) as e:
        raise ConfigError(f"config key {f.name!r}: got {text!r}, allowed: {describe_range(f)}") from e
    return text


def describe_keys() -> str:
    """Every config key with default, range and meaning."""
    lines = ["keys:"]
    for f in dataclasses.fields(Config):
        if f.name not in _FILLED_IN:
            default = DEFAULT_DIMS.get(f.name, f.default)
            shown = str(default).lower() if default is None or isinstance(default, bool) else default
            lines.append(f"  {f.name:16} {shown!s:14} {f.metadata['help']} ({describe_range(f)})")
    lines.append("model sizes: " + "; ".join(f"{k}: {v}" for k, v in MODEL_SIZES.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
