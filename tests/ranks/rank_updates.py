"""Updates on the ranks of torchrun, each with its slices of given batches and draws.

    torchrun --nproc-per-node 2 rank_updates.py OUT CASE...

Each rank writes OUT/RANK.pt: for each case what `updates` returns, and what it raised in an update that is not finite.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_configs import tiny_config, tiny_multitask
from torch import Tensor
from update_oracle import random_batch

from tdmpc2_fast import TDMPC2, Config
from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.learn.batch import Batch, UpdateTrace
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.learn.torch_update import TorchUpdate
from tdmpc2_fast.rng import UpdateNoise, generator
from tdmpc2_fast.runtime.ranks import ALONE, Ranks, joined

CASES = dict(
    plain=tiny_config(dropout=0.2),
    episodic=tiny_config(episodic=True),
    multitask=tiny_multitask(dropout=0.2),
    small=tiny_config(horizon=1, num_bins=21, num_q=2, batch_size=4),
)
UPDATES = 4
BATCHES = 3  # whose gradients are compared: a maximum over those of one small batch is luck
_AT = dict(obs=1, action=1, reward=1, terminated=1, task=0, td_eps=1, pi_eps=1, value_dropout=2, pi_dropout=2)
_CPU = torch.device("cpu")
_AT |= dict(shift_next=1, shift_first=0)


def torchrun(count: int, *words: object, options: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program, or with "-m" a module, on ranks of this machine; options: of torchrun."""
    here = Path(__file__).parents[1]
    path = [here, *(here / x for x in ("support", "support/oracles", "ranks"))]
    call = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(count)]
    env = dict(PYTHONPATH=os.pathsep.join(map(str, path)), OMP_NUM_THREADS="1") | env
    call += ["--master-port", str(_free_port())]
    return subprocess.run(
        [*call, *map(str, words)], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def case(name: str) -> Config:
    """Return the config of a case, `NAME-BACKEND`."""
    which, backend = name.split("-")
    return CASES[which].replace(backend=backend)


def agent_of(cfg: Config, ranks: Ranks = ALONE) -> TDMPC2:
    """Return an agent with non-zero last layers."""
    agent, g = TDMPC2(cfg, ranks=ranks), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in agent.model.named_parameters():
            size = 3.0 if "_Qs" in name else 0.3  # Q values so far apart that the running scale moves
            p.add_(size * torch.randn(p.shape, generator=g) / max(p.shape[-1], 1) ** 0.5)
    return agent


def given(cfg: Config, i: int, ranks: Ranks = ALONE) -> tuple[Batch, UpdateNoise]:
    """Return batch and draws of update i, or this rank's slices of them."""
    batch, noise = random_batch(cfg, _CPU, i), UpdateNoise.draw(cfg, generator(i, "test", _CPU))

    def part(fields: dict[str, Tensor | None]) -> dict[str, Any]:
        return {
            name: x.chunk(ranks.count, _AT[name])[ranks.rank].contiguous()
            for name, x in fields.items()
            if x is not None and name in _AT
        }

    return batch._replace(**part(batch._asdict())), replace(noise, **part(vars(noise)))


def updates(cfg: Config, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Return what came of `UPDATES` from given draws, of one that drew its own, and of one that is not finite.

    metrics: of each of the first. grads: of a first update from each of `BATCHES`. given, params: parameters after the
    given ones, and after the next. noise: see `_noise`. said: by the last one. kept: whether it changed no parameter.
    """
    agent, grads = agent_of(cfg, ranks), []
    for i in range(BATCHES):
        trace = UpdateTrace.empty()
        agent_of(cfg, ranks).updater.step(*given(cfg, i, ranks), trace)
        grads.append(trace.grads)
    metrics = [agent.updater.step(*given(cfg, i, ranks)) for i in range(UPDATES)]
    learned = _tensors(agent)
    batch, _ = given(cfg, UPDATES, ranks)
    drawn = agent.updater.step(batch)  # from draws of its own
    spoilt = batch._replace(reward=batch.reward + (torch.nan if ranks.rank == ranks.count - 1 else 0))
    noise, before = _noise(agent), _tensors(agent)
    said = ""
    try:
        agent.updater.step(spoilt)
        agent.updater.synchronise()
    except NonFiniteError as e:
        said = str(e)
    after = _tensors(agent)
    return dict(
        metrics=metrics,
        given=learned,
        drawn=drawn,
        noise=noise,
        grads=grads,
        params=before,
        said=said,
        kept=all(torch.equal(before[k], after[k]) for k in before),
    )


def _tensors(agent: TDMPC2) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in agent.model.state_dict().items() if torch.is_tensor(v)}


def _noise(agent: TDMPC2) -> dict[str, Tensor]:
    """Return what the update before drew by kernels, or what the next one will draw by torch."""
    update = agent.updater._update
    if isinstance(update, KernelUpdate):
        draws = update.chain.draws
        return dict(td_eps=draws.td_eps.clone(), members=draws.members.clone())
    assert isinstance(update, TorchUpdate)
    noise = UpdateNoise.draw(update.cfg, update.generator, None, update.own_generator)
    return dict(td_eps=noise.td_eps, members=torch.stack([noise.td_members, noise.pi_members]))


def main() -> None:
    """Make the updates of the cases named."""
    torch.set_num_threads(1)
    out, names = Path(sys.argv[1]), sys.argv[2:]
    ranks = joined("cpu", 1.0)
    torch.save({name: updates(case(name), ranks) for name in names}, out / f"{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    main()
