"""What the commands do. Each takes the words after its name and returns the exit status.

Slow imports happen only after the words have been checked.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean

from . import keys, sweep, tables

if TYPE_CHECKING:
    from torch import Tensor

    from tdmpc2_fast.agent import TDMPC2


def train(words: Sequence[str]) -> int:
    """Train an agent, or several in a sweep.

    Several values, as in seed=1,2,3 or seed=1..3, run one after another. One model learns several tasks with
    task=walker-walk,cup-catch as=NAME.
    """
    options, words = keys.options(words, keys.Options)
    each = sweep.expand(words)
    configs = [Config.from_dict(keys.parse(run.words, note=lambda _: None)) for run in each]
    from ..envs import suite_of

    for cfg in configs:  # all mistakes are answered before the first run starts
        for name in cfg.tasks or (cfg.task,):
            suite_of(name)
    if options.job is not None:
        run = sweep.pick(each, options.job)
        if not options.dry_run:
            print(f"job {options.job} of {len(each)}: {run.command}", flush=True)
        each = [run]
    if options.dry_run:
        print("\n".join(run.command for run in each))
        return 0
    if len(each) == 1:
        from ..api import Interrupted
        from ..api import train as run_

        try:
            return run_(tell=sweep.tell, **keys.parse(each[0].words)).status
        except Interrupted as e:
            return e.status
    from tdmpc2_fast.runtime.ranks import under_torchrun

    if under_torchrun():
        raise ConfigError(f"{len(each)} runs under torchrun, allowed: one, or one of them with job=N")
    several = sweep.Sweep(each)
    status = several.run()
    print(tables.rendered(tables.section("sweep", tables.grid(several.rows(), ("run", "result", "took", "where")))))
    return status


def resume(words: Sequence[str]) -> int:
    """Go on with a run that was stopped.

    RUN is its folder. It goes on from its newest checkpoint, bit for bit as if it had not been
    stopped; keys say how far, where and what is shown, as in steps=2_000_000 or device=cuda.
    """
    paths, words = keys.arguments(words)
    path, values = _only(paths, "resume RUN [key=value ...]"), keys.parse(words, presets=False)
    from ..run import lifecycle as runs

    return runs.resume(path, values, runs.Given(sweep.tell)).status


def plot(words: Sequence[str]) -> int:
    """Draw the learning curves of runs.

    RUN is a run's folder, a folder with runs anywhere in it, or a csv file with the columns of
    eval.csv. Runs of one task and exp_name are one line, with the band of their seeds.
    """
    options, words = keys.options(words, keys.PlotOptions)
    paths, others = keys.arguments(words)
    if others or not paths:
        own = [f.name for f in dataclasses.fields(options)]
        close = did_you_mean(others[0].partition("=")[0], own) if others else ""
        got = f"got {others[0]!r}" if others else "no run given"
        raise ConfigError(f"{got}, allowed: tdmpc2-fast plot RUN... [{'=] ['.join(own)}=].{close}")
    out, reference = (None if x is None else Path(x).expanduser() for x in (options.out, options.reference))
    from ..pictures.plots import plot_runs

    for path in plot_runs([Path(p) for p in paths], out, reference, options.max_step):
        print(path)
    return 0


def plan(words: Sequence[str]) -> int:
    """Draw one decision of the planner.

    CHECKPOINT is a file or a run folder. The picture shows the action sequences that were tried and
    kept in each iteration, and how their values went.
    """
    options, words = keys.options(words, keys.PlanOptions)
    paths, words = keys.arguments(words)
    given = _only(paths, "plan CHECKPOINT [decision=N] [out=FILE] [key=value ...]")
    values = keys.parse(words, presets=False)
    from ..envs import make_env
    from ..envs.multitask import TaskEnv
    from ..pictures.plan_picture import draw_plan
    from ..run.evaluate import named

    path, agent = _agent(given, values)
    names = named(agent.cfg, _names(options.tasks))
    if agent.cfg.multitask and len(names) > 1:
        raise ConfigError(f"config key 'tasks': got {options.tasks}, allowed: one of {', '.join(agent.cfg.tasks)}")
    env = make_env(agent.cfg, agent.cfg.seed)
    if isinstance(env, TaskEnv):
        env = env.of(agent.cfg.tasks.index(names[0]))
    try:
        out = Path(options.out).expanduser() if options.out else path.with_name(f"{path.stem}-plan.png")
        print(draw_plan(agent, env, options.decision, out))
    finally:
        env.close()
    return 0


def evaluate(words: Sequence[str]) -> int:
    """Play episodes with a checkpoint.

    CHECKPOINT is a file or a run folder, of which it takes the best one (checkpoint=PATH says the
    same). Keys given here win over those in the checkpoint; save_video=true films the first episode. Of a multi-task
    model all tasks are played, or those of tasks=A,B.
    """
    options, words = keys.options(words, keys.EvalOptions)
    paths, words = keys.arguments(words)
    values = keys.parse(words, presets=False)
    paths += [values["checkpoint"]] if values.get("checkpoint") else []
    given = _only(paths, "eval CHECKPOINT [key=value ...]")
    from ..log.status import returned
    from ..run.evaluate import Evaluator

    path, agent = _agent(given, values)
    evaluator = Evaluator(agent, tasks=_names(options.tasks))
    video = _free(path.with_suffix(".mp4")) if values.get("save_video") else None
    try:
        hidden = not sys.stderr.isatty()
        with click.progressbar(length=0, label="decisions", file=sys.stderr, show_pos=True, hidden=hidden) as bar:

            def busy(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            found = evaluator.run(busy=busy, video=video, warn=keys.to_stderr)
    finally:
        evaluator.close()
    for i, (value, length) in enumerate(zip(found.returns, found.lengths, strict=True)) if not found.by_task else ():
        print(f"episode {i:3}  return {value:8.1f}  decisions {length}")
    for name, of in found.by_task.items():
        succeeded = f", success {mean:.2f}" if (mean := sum(of.successes) / len(of.successes)) else ""
        print(f"{name}: {returned(of.mean_return, of.std_return, len(of.returns))}{succeeded}")
    scored = f", normalised score {found.normalized_score:.1f}" if math.isfinite(found.normalized_score) else ""
    result = returned(found.mean_return, found.std_return, len(found.returns))
    print(f"{agent.cfg.task}: {result}{scored if found.by_task else ''}")
    if video is not None and video.exists():
        print(video)
    return 0


def info(words: Sequence[str]) -> int:
    """Say what a checkpoint holds; without one, what this machine uses.

    Of a checkpoint: its format, size, parameters, tensors and config; official .pt files have no config, but it says
    which published model they are and what has to be given to load them.
    """
    if not words:
        print(tables.rendered(tables.grid(_machine())))
        return 0
    given = _only(words, "info [CHECKPOINT]")
    from tdmpc2_fast.compat.state_dict import TARGETS, from_official_entries, tensors_only, unwrapped
    from tdmpc2_fast.model import checkpoint
    from tdmpc2_fast.model.official import OfficialModel

    from ..run.checkpoints import trained

    path = checkpoint.find_checkpoint(given)
    found, cfg = checkpoint.read(path)
    state, taken_off = unwrapped(found, repr(str(path)))
    kind = f"{checkpoint.FORMAT}, the checksum of its tensors is right"
    if cfg is not None and checkpoint.is_small(path):
        kind += "; small: in float16, without target critics, which are read as the critics"
    official = OfficialModel(found, repr(str(path))) if cfg is None else None
    if official is not None:
        kind = f"official, {'older' if official.older else 'current'} generation (weights only, no config)"
    from_official_entries(state, "", {k: v for k, v in state.items() if k == "_action_masks"})
    tensors = tensors_only(state)
    modules: dict[str, list[Tensor]] = {}
    for name, x in tensors.items():
        if "." in name:  # others are constants, such as the bounds of log std
            modules.setdefault(name.partition(".")[0].strip("_"), []).append(x)
    learnable = sum(x.numel() for k, x in tensors.items() if "." in k and not k.startswith(TARGETS))
    facts = [("file", str(path)), ("format", kind), ("size", f"{path.stat().st_size / 1e6:,.1f} MB")]
    facts += [("trained", trained(path)), ("parameters", f"{learnable:,} learnable"), ("model", _model(tensors))]
    if official is not None:
        facts += [("published as", official.published()), ("load needs", official.needs())]
    facts += [("wrapped in", taken_off)] if taken_off else []
    print(tables.rendered(tables.grid(facts)))
    if cfg is not None:
        print(tables.rendered(tables.section("config, where it is not the default", tables.grid(_changed(cfg)))))
    rows = [
        (name, f"{len(xs)}", f"{sum(x.numel() for x in xs):,}", ", ".join(sorted({str(x.dtype)[6:] for x in xs})))
        for name, xs in modules.items()
    ]
    print(tables.rendered(tables.section("tensors", tables.grid(rows, ("module", "tensors", "numbers", "dtype")))))
    return 0


def _machine() -> list[tuple[str, str]]:
    """Return versions and devices, and which backends this machine has; of the others, why it has none."""
    import torch

    from tdmpc2_fast.config import Config
    from tdmpc2_fast.errors import BackendError
    from tdmpc2_fast.kernels.cpu import build
    from tdmpc2_fast.runtime.backend import resolve_backend, resolve_device
    from tdmpc2_fast.version import __version__

    device = resolve_device("auto")
    facts = [("version", f"{__version__}, torch {torch.__version__}"), ("device", str(device))]
    for backend in ("auto", "triton", "cpu"):
        try:
            name, why = resolve_backend(Config(backend=backend), device)
            facts.append((f"backend={backend}", f"{name} ({why})" if backend == "auto" else "can run"))
        except BackendError as e:
            facts.append((f"backend={backend}", str(e).partition("cannot run: ")[2].partition("; use backend")[0]))
    if build.why_not() is None:
        it = build.kernels()
        facts.append(("CPU kernels", f"{it.path}, by {it.compiler}"))
        facts.append(("bfloat16 on the CPU", it.bfloat16 or "no: it has neither AMX nor AVX512-BF16"))
    return facts


def _agent(given: str, values: dict[str, Any]) -> tuple[Path, TDMPC2]:
    """Load the agent of a checkpoint and say how far it was trained; values given win over those it was made with."""
    from tdmpc2_fast.agent import TDMPC2
    from tdmpc2_fast.compat.hub_files import is_address
    from tdmpc2_fast.model import checkpoint
    from tdmpc2_fast.model.official import OfficialModel
    from tdmpc2_fast.runtime.backend import on_this_machine

    from ..envs import beside, complete, make_env
    from ..run.checkpoints import trained
    from ..run.threads import choose_threads

    path = checkpoint.find_checkpoint(given)
    state, saved = checkpoint.read(path)
    if saved is None:
        cfg = OfficialModel(state, repr(str(path))).config(values, partial=True)
    else:
        _check_task(saved, values)
        # Of several tasks the environments are as the config says; that of one task is asked anew.
        known = saved.to_dict().items()
        cfg = Config.from_dict({k: v for k, v in known if saved.multitask or k not in keys.FILLED_IN})
    cfg = cfg.replace(**{**beside(values, cfg), "checkpoint": str(path)})
    cfg = on_this_machine(cfg, values, note=keys.to_stderr)
    env = make_env(cfg, cfg.seed)
    cfg = complete(cfg, env)
    env.close()
    choose_threads(cfg)
    agent = TDMPC2(cfg)
    checkpoint.load_into(agent.model, state, repr(str(path)), keys.to_stderr, saved)
    print(f"{path}: {trained(path)}")
    # What is drawn and filmed lies beside a file, but not in the Hub's cache.
    return Path(path.name) if is_address(given) else path, agent


def _check_task(saved: Config, values: dict[str, Any]) -> None:
    """Raise `ConfigError` where `task` is not what a multi-task model is called, since it plays its own tasks anyway.

    A model of a single task may be played in another task of the same widths.
    """
    got = values.get("task")
    if saved.multitask and got not in (None, saved.task):
        one = (
            f"; tasks={got} plays this one alone"
            if got in saved.tasks
            else f", whose tasks are {', '.join(saved.tasks)}"
        )
        raise ConfigError(
            f"config key 'task': got {got!r}, allowed: {saved.task!r}, as the multi-task model is called{one}"
        )


def _names(tasks: str | None) -> list[str]:
    return [] if tasks is None else [name.strip() for name in tasks.split(",")]


def _free(path: Path) -> Path:
    """Return the name, with a number after it where it is taken."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2)))
    return next(p for p in names if not p.exists())


def _only(given: Sequence[str], usage: str) -> str:
    if len(given) != 1:
        got = f"{len(given)} arguments ({' '.join(given)})" if given else "no argument"
        raise ConfigError(f"got {got}, allowed: tdmpc2-fast {usage}")
    return given[0]


def _model(tensors: dict[str, Tensor]) -> str:
    """Read the sizes that a person needs to build the model off the shapes."""
    from tdmpc2_fast.compat.state_dict import dims

    found = dims(tensors)
    width = {f"{found['obs']} channels" if found["obs"] == "rgb" else "observation": found["observation"]}
    sizes = width | {k: found[k] for k in ("action_dim", "latent_dim", "mlp_dim", "num_q")}
    sizes |= {k: found[k] for k in ("tasks", "task_dim") if found["tasks"]}
    return ", ".join(f"{k} {v}" for k, v in sizes.items())


def _changed(cfg: Config) -> list[tuple[str, str]]:
    default = Config(model_size=cfg.model_size).to_dict()
    default["model_size"] = default["env_kwargs"] = None
    found = {k: v for k, v in cfg.to_dict().items() if v != default[k] or k == "task"}
    found |= keys.settings(found.pop("env_kwargs", None))
    return [(f"{k}={v}", "") for k, v in found.items()]
