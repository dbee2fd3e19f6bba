"""A run from its first step to its summary: begun, gone on with, stopped, finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tdmpc2_fast.agent import TDMPC2
from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import CheckpointError, ConfigError, DataError, InputError, NonFiniteError
from tdmpc2_fast.model.transfer import Donor
from tdmpc2_fast.runtime.backend import on_this_machine
from tdmpc2_fast.runtime.ranks import Ranks, among, under_torchrun

from ..envs import beside, same_form, tried
from ..envs.apart.workers import leave_if_imported_anew
from ..envs.base import close_all
from ..envs.given import Source
from ..log.sinks import wandb_package
from ..log.status import returned
from ..pictures.plots import plot_runs
from .checkpoints import Checkpoints, Saved, trained
from .evaluate import Evaluation
from .events import Callback
from .folder import discard, home, locked, new_folder
from .loops.base import Trainer
from .loops.choice import check_data, donor_of, is_offline, keys_of, trainer_of, without_effect
from .shared.dealing import of_rank
from .stop import Stop, Stopped
from .threads import choose_threads

CHANGEABLE = (
    *("steps", "eval_freq", "eval_episodes", "checkpoint_minutes", "keep_checkpoints", "save_video"),
    *("enable_wandb", "wandb_project", "wandb_entity", "wandb_silent", "tensorboard", "display"),
    *("device", "backend", "precision", "num_threads", "overlap", "env_workers"),
    *("buffer_size", "on_env_error", "data_dir", "rank_timeout"),
)
"""Keys a run may go on with other values of: how long, where, what fits there, and what is shown. The rest is fixed."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    status: as a command's: 0 fine, 1 nothing was learned or the weights of the end could not be written, 128 and
        the number of the signal that stopped it.
    agent, evaluation: None where the run had finished before.
    """

    status: int
    folder: Path
    agent: TDMPC2 | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Given:
    """What a program hands over to a run beside its keys.

    tell: told `folder`, and `mean_return` and `std_return` of the last evaluation.
    source, evaluation: where the environments of training and evaluation come from; default by the task's name.
    callbacks: told what happens; see `run.events`.
    """

    tell: Callable[..., None] = lambda **facts: None
    source: Source = field(default_factory=Source)
    evaluation: Source | None = None
    callbacks: Sequence[Callback] = ()


def start(values: Mapping[str, Any], given: Given | None = None) -> Outcome:
    """Begin a run, or with `resume=auto` go on with the one in its folder."""
    given = given or Given()
    cfg = Config.from_dict(values)
    leave_if_imported_anew()
    if cfg.resume is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "config key 'resume': got None under torchrun --max-restarts, allowed: auto, or a restart would begin anew"
        )
    with among(cfg.device, cfg.rank_timeout) as ranks:
        return _start(values, given, ranks)


def _start(values: Mapping[str, Any], given: Given, ranks: Ranks) -> Outcome:
    cfg = Config.from_dict(values)
    begun = cfg.resume == "auto" and Checkpoints(home(cfg), cfg.keep_checkpoints).last() is not None
    begun = ranks.of_first(begun)
    # A run that was begun has all that it takes from the other model, which may be gone.
    donor = None if begun else donor_of(values, given.source)
    values = keys_of(values, donor)
    cfg = Config.from_dict(values)
    if cfg.tasks and not (given.source.by_name and given.evaluation is None):
        raise ConfigError("env: got environments beside `tasks`, allowed: none, since several tasks are made by name")
    ranks.equal(cfg, "batch_size")
    if not is_offline(cfg):
        ranks.equal(cfg, "num_envs")
    widths: dict[str, int] = {}
    fixed = tried(cfg, given.source.form, given.source.tried, widths)  # errors before a folder is made
    if given.evaluation is not None:
        close_all([same_form(given.evaluation.form(fixed), fixed)])
    notes = [
        f"{k}={getattr(fixed, k)}, fixed by the task {cfg.task}: the {getattr(cfg, k)} asked for has no effect"
        for k in values
        if getattr(fixed, k) != getattr(cfg, k)
    ]
    notes += without_effect(values, cfg)
    if begun:

        def as_begun(saved: Config) -> dict[str, Any]:
            wanted = fixed if cfg.init is None else Donor({}, saved, cfg.init).fitted(fixed)
            return {k: getattr(wanted, k) for k in values if k not in ("resume", "work_dir")}

        return _resume(home(cfg), as_begun, given, ranks)
    fixed = fixed if donor is None else donor.fitted(fixed)
    del donor  # its weights are read again where they are taken: meanwhile they would be in memory
    check_data(fixed, widths)
    if cfg.enable_wandb:
        wandb_package()
    cfg = fixed if cfg.data_dir is not None or cfg.init is not None else cfg
    # Kept in config.json: other threads, other rounding.
    cfg = cfg.replace(num_threads=ranks.of_first(choose_threads(cfg)))
    choose_threads(cfg)
    folder = Path(ranks.done(lambda: str(new_folder(cfg)) if ranks.first else None)[0])
    with _held(folder, ranks):
        try:
            return _run(cfg, folder, None, notes, given, ranks)
        finally:
            if ranks.first:
                discard(folder)  # where nothing came of it


def resume(run: str | Path, values: Mapping[str, Any], given: Given | None = None) -> Outcome:
    """Go on with a run from its newest checkpoint.

    Args:
        run: its folder.
        values: keys to change, of `CHANGEABLE`; others may be given if they are as they were.
        given: as for `start`.

    Raises:
        CheckpointError: no run, or none of its checkpoints is whole.
        ConfigError: a key that cannot be changed, or another process has the run.
    """
    folder = Path(run)
    if (why := _why_no_run(folder)) is not None:
        raise CheckpointError(f"run {str(folder)!r}: {why}, allowed: the folder of a run")
    begun = json.loads((folder / "config.json").read_text()) if under_torchrun() else {}
    keys = {k: values.get(k, begun.get(k)) for k in ("device", "rank_timeout")}
    cfg = Config.from_dict({k: x for k, x in keys.items() if x is not None})
    with among(cfg.device, cfg.rank_timeout) as ranks:
        return _resume(folder, lambda _: values, given or Given(), ranks)


def _resume(folder: Path, wanted: Callable[[Config], Mapping[str, Any]], given: Given, ranks: Ranks) -> Outcome:
    """Go on with a run; `wanted` returns the keys given, as they are in a run of this config."""
    notes: list[str] = []
    with _held(folder, ranks):
        saved = Checkpoints(folder, 1, ranks).newest(notes.append)
        if saved is None:
            raise CheckpointError(f"run {str(folder)!r}: it was stopped before its first checkpoint; start it anew")
        saved = of_rank(saved, ranks)
        values = wanted(saved.cfg)
        cfg = on_this_machine(_changed(saved.cfg, values, folder), values, notes.append)
        notes += without_effect(values, cfg)
        if cfg.data_dir is not None and not Path(cfg.data_dir).expanduser().is_dir():
            raise DataError(
                f"data {cfg.data_dir!r}, of the run in {str(folder)!r}: no such folder, seen from {str(Path.cwd())!r}; "
                "data_dir=FOLDER says where it is now"
            )
        if cfg.enable_wandb:
            wandb_package()
        done, unit = saved.values["decisions"], "updates" if is_offline(cfg) else "decisions"
        if saved.values["evaluated_at"] >= cfg.steps:
            more = 2 * max(cfg.steps, done)
            learned = "updater/steps" in saved.tensors
            how = "finished" if learned else "finished, and nothing was learned,"
            if ranks.first:
                print(f"{how} at {done:,} {unit}; to go on: {_call(folder, given.source, more)}")
            return Outcome(int(not learned), folder)
        choose_threads(cfg)
        return _run(cfg, folder, saved, [*notes, f"going on at {done:,} {unit} from {saved.folder}"], given, ranks)


@contextlib.contextmanager
def _held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs from this folder; ranks share the lock of the first one."""
    with contextlib.ExitStack() as stack:
        ranks.done(lambda: stack.enter_context(locked(folder)) if ranks.first else None)
        yield


def _why_no_run(folder: Path) -> str | None:
    """Say what a folder is that is not of a run with checkpoints; return None where it is one."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    if (folder / "checkpoints").is_dir():
        return None
    if (folder / "config.json").is_file():
        return "a run that wrote no checkpoint to go on from"
    inside = sorted(p.parent.relative_to(folder) for p in folder.glob("*/checkpoints"))
    return f"no run, but runs are in it ({', '.join(map(str, inside))})" if inside else "no run"


def _changed(saved: Config, values: Mapping[str, Any], folder: Path) -> Config:
    given = Config.from_dict(beside(values, saved))
    changes = {k: getattr(given, k) for k in values if getattr(given, k) != getattr(saved, k)}
    if "data_dir" in changes and None in (given.data_dir, saved.data_dir):  # another loop, which has kept other things
        allowed = "none, since it learns without data" if saved.data_dir is None else "the folder where its data is now"
        raise ConfigError(
            f"config key 'data_dir': got {given.data_dir!r}, but the run in {str(folder)!r} has {saved.data_dir!r}, "
            f"allowed: {allowed}; or a run of its own, which init=PATH begins with the weights of this one"
        )
    for key, value in changes.items():
        if key not in CHANGEABLE:
            raise ConfigError(
                f"config key {key!r}: got {value!r}, but the run in {str(folder)!r} has {getattr(saved, key)!r}, which "
                f"makes it what it is. Allowed: the same; changes of {', '.join(CHANGEABLE)}; or a run of its own "
                "(another exp_name or work_dir; checkpoint=PATH begins with the weights of this one)"
            )
    return saved.replace(**changes)


def _run(cfg: Config, folder: Path, saved: Saved | None, notes: Sequence[str], given: Given, ranks: Ranks) -> Outcome:
    if not ranks.first:
        notes, given = [], replace(given, tell=lambda **facts: None, callbacks=())
    tell = given.tell
    tell(folder=str(folder))
    stop = Stop()
    with stop.listening():
        trainer = trainer_of(cfg, folder, saved, stop, given.source, given.evaluation, ranks)
        trainer.call(given.callbacks)
        summary: list[str] = []
        for note in notes:  # of a new run: what was asked for and has no effect
            (trainer.log.warn if saved is None else trainer.log.note)(note)
        try:
            found = trainer.run()
        except Stopped as e:
            summary = [f"stopped by {e}", *_how_to_go_on(trainer)]
            return Outcome(128 + e.signal, folder, trainer.agent)
        except KeyboardInterrupt:
            summary = ["stopped at once", *_how_to_go_on(trainer)]
            return Outcome(130, folder, trainer.agent)
        except ConfigError:
            summary = _how_to_go_on(trainer)[:1]  # going on would fail in the same way
            raise
        except BaseException as e:
            summary = _how_to_go_on(trainer)
            if isinstance(e, NonFiniteError) and cfg.data_dir is not None:
                e.add_note(f"tdmpc2-fast data check {cfg.data_dir} tells whether it comes from the data")
            raise
        else:
            if not ranks.first:
                return Outcome(0, folder, trainer.agent, found)
            tell(mean_return=found.mean_return, std_return=found.std_return)
            result = returned(found.mean_return, found.std_return, len(found.returns))
            if more := trainer.result():
                result += f"; {more}"
            if not trainer.agent.updater.steps:
                why = "a callback ended it" if trainer.ended else trainer.why_nothing_learned()
                why = f"nothing was learned: {why}"
                tell(error=why)
                summary = [f"done, but {why}", result, *_files(folder)]
                return Outcome(1, folder, trainer.agent, found)
            summary = [f"done: {result}", *_files(folder)]
            last = trainer.checkpoints.last()
            if cfg.save_agent and (last is None or int(last.name.rpartition("-")[2]) < trainer.progress.decisions):
                why = "the weights of the end could not be written"
                tell(error=why)
                summary = [f"done, but {why}: {result}", *_how_to_go_on(trainer)]
                return Outcome(1, folder, trainer.agent, found)
            return Outcome(0, folder, trainer.agent, found)
        finally:
            trainer.log.close(summary)


def _files(folder: Path) -> list[str]:
    """Draw the learning curve and list the files of a run."""
    try:
        curve = str(plot_runs([folder])[0])
    except (ConfigError, InputError, OSError) as e:
        curve = f"not drawn: {e}"
    videos = sorted((folder / "videos").glob("*.mp4"), key=lambda p: int(p.stem))
    places = [("numbers", folder / "eval.csv"), ("numbers", folder / "train.csv"), *(("video", p) for p in videos[-1:])]
    places += [("weights", folder / "checkpoints" / "best.safetensors"), ("TensorBoard", folder / "tensorboard")]
    found = [("curve", curve), *((name, str(path)) for name, path in places if path.exists())]
    return [f"  {name:12} {text}" + (f": {trained(Path(text))}" if name == "weights" else "") for name, text in found]


def _how_to_go_on(trainer: Trainer) -> list[str]:
    last = trainer.checkpoints.last()
    if last is None:
        return [f"no checkpoint was written{'' if trainer.cfg.save_agent else ' (save_agent=false)'}"]
    return [f"last checkpoint: {last}", f"to go on: {_call(trainer.folder, trainer.source)}"]


def _call(folder: Path, source: Source, steps: int | None = None) -> str:
    """Return what goes on with a run: a command, or for environments that were handed over, a call."""
    if source.by_name:
        return f"tdmpc2-fast resume {folder}" + (f" steps={steps}" if steps else "")
    return f"train(env, resume='auto', work_dir={str(folder)!r}{f', steps={steps}' if steps else ''})"
