"""What an update draws: which law each tensor follows, and which stream of Philox it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.draw import INTEGER, KEEP, NORMAL, PAIRS, Run, check_critics
from ..device.launch import check_tensor
from ..layers.sizes import SHIFT_PAD
from .buffers import UpdateDraws


def update_runs(draws: UpdateDraws, num_q: int, p: float) -> list[Run]:
    """Return all draws of an update, two pairs of `num_q` critics and dropout masks of rate `p` among them.

    p: 0 to below 1, rounded to a multiple of 2^-32; without dropout there are no masks.

    Raises:
        ValueError: a tensor of another shape, type or layout; p or num_q out of range.
    """
    _check(draws, num_q, p)
    runs = [
        Run("td_eps", NORMAL, 16, draws.td_eps),
        Run("pi_eps", NORMAL, 17, draws.pi_eps),
        Run("members", PAIRS, 18, draws.members, num_q),
    ]
    for name, stream, keep in (("value_keep", 19, draws.value_keep), ("pi_keep", 20, draws.pi_keep)):
        if keep is not None:
            runs.append(Run(name, KEEP, stream, keep, _dropped(p)))
    return runs if draws.shift is None else [*runs, Run("shift", INTEGER, 21, draws.shift, 2 * SHIFT_PAD + 1)]


def _dropped(p: float) -> int:
    """Return how many of 2^32 words drop an entry."""
    return min(round(p * 2**32), 2**32 - 1)


def _check(draws: UpdateDraws, num_q: int, p: float) -> None:
    """Refuse draws that do not go with each other."""
    if draws.td_eps.ndim != 3:
        raise ValueError(f"td_eps: got shape {tuple(draws.td_eps.shape)}, allowed: (H, B, A)")
    check_critics(num_q)
    if not 0 <= p < 1:
        raise ValueError(f"p: got {p}, allowed: 0 to below 1")
    h, b, a = draws.td_eps.shape
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("td_eps", draws.td_eps, (h, b, a), torch.float32),
        ("pi_eps", draws.pi_eps, (h + 1, b, a), torch.float32),
        ("members", draws.members, (2, 2), torch.int64),
        ("shift", draws.shift, (h + 1, b, 1, 1, 2), torch.int64),
    ]
    for name, keep, q, steps in (("value_keep", draws.value_keep, num_q, h), ("pi_keep", draws.pi_keep, 2, h + 1)):
        if (keep is None) != (p == 0):
            got = "None" if keep is None else "a mask"
            raise ValueError(f"{name}: got {got} with p={p}, allowed: None where p is 0")
        if keep is not None:
            wanted.append((name, keep, (q, steps, b, keep.shape[-1] if keep.ndim == 4 else -1), torch.uint8))
    for name, x, shape, dtype in wanted:
        if x is not None:
            check_tensor(name, x, shape, draws.td_eps, dtype)
