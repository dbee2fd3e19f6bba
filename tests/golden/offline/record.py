"""Record the official offline training, from a checkout of the official code.

    PYTHONPATH=tests/support:tests/support/oracles python tests/golden/offline/record.py CHECKOUT

It takes tensordict, which the official code needs, but neither torchrl, whose buffer is replaced, nor a GPU. Its own
`OfflineTrainer.train` runs with its own agent; only where batches come from, evaluation and logger are given.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from offline_case import (
    DECISIONS,
    EPISODES,
    NOISE,
    PER_TASK,
    RECORDED,
    SIZES,
    UPDATES,
    config,
    data_in,
    with_given_weights,
)

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.benchmarks.baselines.official import OfficialConfig, official_agent
from tdmpc2_fast.compat.draws import updated
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.rng import UpdateNoise, generator
from tdmpc2_fast.train.data.draws import Draws


def write_episodes() -> None:
    """Write a file as the official data sets are: a TensorDict of episodes, padded to the widest task."""
    from tensordict import TensorDict

    rng = np.random.default_rng(7)
    shape = len(SIZES) * PER_TASK, DECISIONS + 1
    obs, action = np.zeros((*shape, 24), np.float32), np.zeros((*shape, 6), np.float32)
    task = np.repeat(np.arange(len(SIZES)), PER_TASK)
    for i, (o, a) in zip(task, [SIZES[list(SIZES)[t]] for t in task], strict=True):
        which = task == i
        obs[which, :, :o] = rng.standard_normal((PER_TASK, shape[1], o))
        action[which, :, :a] = rng.uniform(-1, 1, (PER_TASK, shape[1], a))
    reward = rng.uniform(0, 2, shape).astype(np.float32)
    action[:, 0], reward[:, 0] = np.nan, np.nan
    columns = dict(obs=obs, action=action, reward=reward, task=np.repeat(task[:, None], shape[1], 1).astype(np.int32))
    torch.save(TensorDict({k: torch.from_numpy(v) for k, v in columns.items()}, batch_size=shape), EPISODES)


def official_trainer(checkout: str) -> type[Any]:
    """Import the official `OfflineTrainer`; of torchrl, which only its buffer uses, names are enough."""
    for name in ("torchrl", "torchrl.data", "torchrl.data.replay_buffers", "torchrl.data.replay_buffers.samplers"):
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for thing in ("ReplayBuffer", "LazyTensorStorage", "SliceSampler"):
            setattr(module, thing, object)
    sys.path.insert(0, str(Path(checkout) / "tdmpc2"))
    found: type[Any] = importlib.import_module("trainer.offline_trainer").OfflineTrainer
    return found


def main(checkout: str) -> None:
    """Run the official training and write what came of it."""
    write_episodes()
    cfg = config()
    ours = with_given_weights(TDMPC2(cfg))
    theirs = official_agent(checkout, ours, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        draws = Draws(data_in(Path(folder)), cfg, "cpu")
        batches = [draws.batch(i) for i in range(UPDATES)]
        draws.close()
    g = generator(11, "recorded", torch.device("cpu"))
    noises = [UpdateNoise.draw(cfg, g) for _ in range(UPDATES)]
    metrics: list[dict[str, Any]] = []

    def update(buffer: Any) -> dict[str, Any]:
        assert buffer == "the data"
        number = len(metrics)
        metrics.append(updated(theirs, batches[number], noises[number]))
        return metrics[-1]

    trainer = object.__new__(official_trainer(checkout))
    trainer.cfg = OfficialConfig(**cfg.to_dict() | dict(task="mt30"))  # the only sets it takes
    trainer.agent = SimpleNamespace(update=update, model=theirs.model)
    silent = dict.fromkeys(("pprint_multitask", "save_agent", "log", "finish"), lambda *args, **kwargs: None)
    trainer.logger, trainer._start_time = SimpleNamespace(**silent), 0.0
    trainer.eval = dict
    trainer._load_dataset = lambda: setattr(trainer, "buffer", "the data")
    trainer.train()
    assert len(metrics) == UPDATES

    kept: dict[str, Any] = {f"metric {k}": np.array([float(m[k]) for m in metrics]) for k in metrics[0]}
    kept |= {f"noise {k}": np.stack([getattr(n, k).numpy() for n in noises]) for k in NOISE}
    state = {k: v for k, v in theirs.model.state_dict().items() if isinstance(v, torch.Tensor)}
    kept |= {f"weight {k}": v.numpy() for k, v in tensors_only(state).items() if v.ndim}
    kept["scale"] = theirs.scale.value.numpy()
    kept["batch sums"] = np.array([[float(x.double().sum()) for x in b if x is not None] for b in batches])
    np.savez_compressed(RECORDED, **kept)
    print(RECORDED, RECORDED.stat().st_size, "torch", torch.__version__)


if __name__ == "__main__":
    main(sys.argv[1])
