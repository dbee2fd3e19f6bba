"""Which loop a config asks for: with environments, from a data set, or with both; and what comes before it.

task=X                          environments alone
task=X data_dir=FOLDER          the data set alone, as the official multi-task training
task=X data_dir=FOLDER mix=0.5  environments, and half of each batch from the data set
init=CHECKPOINT                 in each of them: weights for a new task begin as those of another model
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, DataError
from tdmpc2_fast.model.transfer import Donor
from tdmpc2_fast.runtime.backend import resolve_device
from tdmpc2_fast.runtime.ranks import Ranks
from tdmpc2_fast.task_sets import TASK_SETS

from ...data.dataset import DataSet
from ...data.draws import Draws
from ...envs.given import Source
from ...log.status import counted
from ..checkpoints import Saved
from ..stop import Stop
from ..trainer import OnlineTrainer
from .base import Trainer
from .mixed import shares
from .offline import OfflineTrainer

_OFFICIAL_BATCH = 1024
_OF_PLAYING = ("utd", "seed_steps", "num_envs", "env_workers", "buffer_size", "overlap")


def is_offline(cfg: Config) -> bool:
    """Tell whether a run learns from a data set alone, so that it counts updates."""
    return cfg.data_dir is not None and cfg.mix is None


def donor_of(values: Mapping[str, Any], source: Source) -> Donor | None:
    """Return the model that a run begins from, if there is one.

    Raises:
        CheckpointError: no model can be read from `init`.
        ConfigError: `checkpoint` is given, too; or neither, where `freeze` is; or it is of several tasks, and the
            environment is no task by its name.
    """
    cfg = Config.from_dict(values)
    if cfg.init is not None and cfg.checkpoint is not None:
        raise ConfigError(
            f"config key 'init': got {cfg.init!r}, allowed: none where checkpoint is given, which sets all weights"
        )
    if cfg.freeze is not None and not cfg.has_weights:
        raise ConfigError(
            f"config key 'freeze': got {cfg.freeze!r}, allowed: none without init or checkpoint, since fresh weights "
            "are random"
        )
    donor = None if cfg.init is None else Donor.read(cfg.init)
    if donor is not None and donor.cfg.multitask and not source.by_name:
        raise ConfigError(
            f"config key 'init': got {cfg.init!r}, a multi-task model, allowed: one of a single task where the "
            "environment is an object, or a task by its name"
        )
    return donor


def keys_of(values: Mapping[str, Any], donor: Donor | None) -> dict[str, Any]:
    """Return the keys of a run: those given, the architecture of the model it begins from, and the official batch.

    Raises:
        ConfigError: keys that go against that model.
    """
    cfg = Config.from_dict(values)
    values = values if donor is None else donor.keys(values)
    if cfg.task in TASK_SETS and is_offline(cfg) and values.get("batch_size") is None:
        values = {**values, "batch_size": _OFFICIAL_BATCH}
    return dict(values)


def without_effect(values: Mapping[str, Any], cfg: Config) -> list[str]:
    """Say of each key given that nothing in the run reads it."""
    if not is_offline(cfg):
        return []
    given, default = Config.from_dict(values), Config()
    return [
        f"{k}={getattr(given, k)} has no effect: the run learns from data alone, and plays only to be evaluated"
        for k in _OF_PLAYING
        if k in values and getattr(given, k) != getattr(default, k)
    ]


def check_data(cfg: Config, widths: Mapping[str, int]) -> None:
    """Raise a `DataError` where a completed config and its data set do not go together.

    widths: of the observations of each task, which a multi-task config does not tell.
    """
    if cfg.data_dir is None:
        return
    data = _opened(cfg)
    data.close()
    for task in data.tasks:
        width = widths.get(task.name) if task.name in cfg.tasks else None
        if width is not None and task.obs_dim != width:
            raise DataError(
                f"data {cfg.data_dir!r}: {task.name!r} has observations of {task.obs_dim} numbers, allowed: {width}, "
                "as its environment"
            )


def _opened(cfg: Config) -> DataSet:
    """Open the data set of a completed config.

    Raises:
        DataError: none, a damaged one, or one without the config's tasks or with others under their names.
    """
    if cfg.obs != "state":
        raise ConfigError(f"config key 'obs': got {cfg.obs!r}, allowed with data_dir: 'state'")
    assert cfg.data_dir is not None
    data = DataSet.open(cfg.data_dir)
    lengths = zip(cfg.tasks, cfg.episode_lengths, strict=True) if cfg.multitask else [(cfg.task, cfg.episode_length)]
    allowed = dict(lengths)
    for task in data.tasks:
        most = allowed.get(task.name)
        if most is not None and task.episode_length > most:
            data.close()
            raise DataError(
                f"data {cfg.data_dir!r}: {task.name} has episodes of {task.episode_length} decisions, allowed: at most "
                f"{most}, the length of the task's"
            )
        if task.terminated and task.name in allowed and not cfg.episodic:
            data.close()
            raise DataError(
                f"data {cfg.data_dir!r}: {task.name} has {counted(task.terminated, 'episode')} that terminated, "
                "allowed: none in a multi-task model; in one of a single task, set episodic=true"
            )
    try:
        Draws(data, cfg, "cpu").close()
    except DataError:
        data.close()
        raise
    return data


class _OwnDraws(Draws):
    """Draws from a data set that nobody else reads."""

    @override
    def close(self) -> None:
        super().close()
        self.data.close()


def _facts(draws: Draws) -> dict[str, str]:
    found = f"{counted(draws.num_episodes, 'episode')}, {draws.num_steps:,} decisions, of {draws.data.folder}"
    short = draws.num_episodes - draws.num_sampleable
    return dict(data=f"{found}; {short:,} shorter than horizon are left out" if short else found)


def trainer_of(
    cfg: Config,
    folder: Path,
    saved: Saved | None,
    stop: Stop,
    source: Source,
    evaluation: Source | None,
    ranks: Ranks,
) -> Trainer:
    """Make the trainer that a config asks for; with `data_dir` it is a completed one."""
    if cfg.data_dir is None:
        return OnlineTrainer(cfg, folder, saved, stop, source, evaluation, ranks=ranks)
    data = _opened(cfg)
    own = cfg.replace(batch_size=ranks.equal(cfg, "batch_size"))
    _, share = shares(own)
    # Ranks draw one batch of the whole run together, so that they need its seed.
    own = own.replace(batch_size=share or own.batch_size)
    draws = _OwnDraws(data, own, resolve_device(cfg.device), ranks.rank, ranks.count)
    try:
        if saved is not None:  # other data is told of before anything is shown or written
            draws.load_state({k.removeprefix("data/"): x for k, x in saved.tensors.items() if k.startswith("data/")})
        facts = _facts(draws)
        if is_offline(cfg):
            return OfflineTrainer(cfg, draws, folder, saved, stop, evaluation or source, facts, ranks)
        return OnlineTrainer(cfg, folder, saved, stop, source, evaluation, draws, facts, ranks)
    except BaseException:
        draws.close()
        raise
