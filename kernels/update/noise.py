"""All draws of an update in one launch: policy noise, pairs of critics, dropout masks, pixel shifts.

As the draws of a plan (noise.py): Philox words from a seed and a counter on the device, one call
for four consecutive elements of a tensor, a stream for each tensor. A mask keeps an entry where its
word, as a fraction of 2^32, is at least p: one byte an entry, a sixteenth of a float32 multiplier
read and written. Cost: the masks', about 70 integer instructions for four bytes written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import await_producers, cdiv, check_tensor, interpreting, jit, launch, pow2, tl
from ..device.philox import (
    check_state,
    distinct_pair,
    distinct_pairs_reference,
    fill_normal,
    four,
    four_words,
    in_range,
    normal_pair,
    stream_words,
)

# Streams of one update, in the order of the grid. Never renumber: a seed means these draws.
_FIRST_STREAM = 16
_STREAMS = ("td_eps", "pi_eps", "members", "value_keep", "pi_keep", "shift")

_SHIFTS = 7
_GROUPS = 256
_INTERPRETED_GROUPS = 16384

SHIFTS, FIRST_STREAM = tl.constexpr(_SHIFTS), tl.constexpr(_FIRST_STREAM)


@jit
def update_noise_kernel(
    state_ptr,
    td_eps_ptr,
    pi_eps_ptr,
    td_members_ptr,
    pi_members_ptr,
    value_keep_ptr,
    pi_keep_ptr,
    shift_ptr,
    td_eps_n,
    pi_eps_n,
    value_keep_n,
    pi_keep_n,
    shift_n,
    pi_eps_at,
    members_at,
    value_keep_at,
    pi_keep_at,
    shift_at,
    num_q,
    DROPPED: tl.constexpr,
    BG: tl.constexpr,
    PDL: tl.constexpr,
):
    """BG groups of four elements of one tensor; grid (programs of all tensors in turn,)."""
    await_producers(PDL)
    program = tl.program_id(0)
    # *_at: the first program of a tensor. The last one that has begun is this program's.
    stream = 0
    at = 0
    size = td_eps_n
    normal_ptr = td_eps_ptr
    keep_ptr = value_keep_ptr
    if program >= pi_eps_at:
        stream = 1
        at = pi_eps_at
        size = pi_eps_n
        normal_ptr = pi_eps_ptr
    if program >= members_at:
        stream = 2
        at = members_at
        size = 4
    if program >= value_keep_at:
        stream = 3
        at = value_keep_at
        size = value_keep_n
    if program >= pi_keep_at:
        stream = 4
        at = pi_keep_at
        size = pi_keep_n
        keep_ptr = pi_keep_ptr
    if program >= shift_at:
        stream = 5
        at = shift_at
        size = shift_n

    group = (program - at) * BG + tl.arange(0, BG)  # [BG]
    element = (program - at).to(tl.int64) * (4 * BG) + tl.arange(0, 4 * BG)
    ok = element < size
    w0, w1, w2, w3 = four_words(state_ptr, group, FIRST_STREAM + stream)
    if stream < 2:
        x0, x1 = normal_pair(w0, w1)
        x2, x3 = normal_pair(w2, w3)
        tl.store(normal_ptr + element, four(x0, x1, x2, x3), mask=ok)
    elif stream == 2:
        i0, j1 = distinct_pair(w0, w1, num_q)
        i2, j3 = distinct_pair(w2, w3, num_q)
        pairs = four(i0, j1, i2, j3)
        tl.store(td_members_ptr + element, pairs, mask=element < 2)
        tl.store(pi_members_ptr + element - 2, pairs, mask=(element >= 2) & ok)
    elif stream < 5:
        # Compared before they are put in order: bytes are cheaper to move than words.
        keep = four(
            (w0 >= DROPPED).to(tl.uint8),
            (w1 >= DROPPED).to(tl.uint8),
            (w2 >= DROPPED).to(tl.uint8),
            (w3 >= DROPPED).to(tl.uint8),
        )
        tl.store(keep_ptr + element, keep, mask=ok)
    else:
        tl.store(shift_ptr + element, in_range(four(w0, w1, w2, w3), SHIFTS), mask=ok)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, state: Tensor) -> None:
    """Refuse what the kernel would fill wrongly."""
    check_tensor(name, x, shape, state, dtype)
    if x.numel() >= 2**31:
        raise ValueError(f"{name}: got {x.numel()} elements, allowed: fewer than 2**31")


def _check_update(
    state: Tensor,
    td_eps: Tensor,
    pi_eps: Tensor,
    td_members: Tensor,
    pi_members: Tensor,
    num_q: int,
    value_keep: Tensor | None,
    pi_keep: Tensor | None,
    p: float,
    shift: Tensor | None,
) -> None:
    check_state(state)
    if td_eps.ndim != 3:
        raise ValueError(f"td_eps: got shape {tuple(td_eps.shape)}, allowed: (H, B, A)")
    h, b, a = td_eps.shape
    _check("td_eps", td_eps, (h, b, a), torch.float32, state)
    _check("pi_eps", pi_eps, (h + 1, b, a), torch.float32, state)
    _check("td_members", td_members, (2,), torch.int64, state)
    _check("pi_members", pi_members, (2,), torch.int64, state)
    if num_q < 2:
        raise ValueError(f"num_q: got {num_q}, allowed: at least 2, pairs of critics are drawn")
    if not 0 <= p < 1:
        raise ValueError(f"p: got {p}, allowed: 0 to below 1")
    for name, keep, q, steps in (("value_keep", value_keep, num_q, h), ("pi_keep", pi_keep, 2, h + 1)):
        if (keep is None) != (p == 0):
            raise ValueError(
                f"{name}: got {'None' if keep is None else 'a mask'} with p={p}, allowed: None where p is 0"
            )
        if keep is not None:
            d = keep.shape[-1] if keep.ndim == 4 else -1
            _check(name, keep, (q, steps, b, d), torch.uint8, state)
    if shift is not None:
        _check("shift", shift, (h + 1, b, 1, 1, 2), torch.int64, state)


def _dropped(p: float) -> int:
    """How many of 2^32 words drop an entry."""
    return min(round(p * 2**32), 2**32 - 1)


def draw_update_noise(
    state: Tensor,
    *,
    td_eps: Tensor,
    pi_eps: Tensor,
    td_members: Tensor,
    pi_members: Tensor,
    num_q: int,
    value_keep: Tensor | None = None,
    pi_keep: Tensor | None = None,
    p: float = 0.0,
    shift: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Fill the draws of one update, in place and in one launch.

    Args:
        state: (2,) int64 seed and update counter; another kernel counts.
        td_eps: out: (H, B, A) standard normal, policy at the next latents.
        pi_eps: out: (H+1, B, A) standard normal, policy loss.
        td_members: out: (2,) int64, two distinct critics of `num_q`, ordered: TD target.
        pi_members: out: (2,) int64, likewise: policy loss.
        num_q: number of critics, at least 2.
        value_keep: out: (Q, H, B, D) uint8, 0 where dropout drops an entry, else 1; None where p is 0.
        pi_keep: out: (2, H+1, B, D) uint8, likewise.
        p: probability of dropping, 0 to below 1, rounded to a multiple of 2^-32.
        shift: out: (H+1, B, 1, 1, 2) int64, 0 to 6: pixel shifts of obs.
        pdl: programmatic dependent launch.

    Floats are float32; all tensors are contiguous and on one device.

    Raises:
        ValueError: a tensor of another shape, type or layout; p or num_q out of range.
    """
    _check_update(state, td_eps, pi_eps, td_members, pi_members, num_q, value_keep, pi_keep, p, shift)
    sizes = [0 if x is None else x.numel() for x in (td_eps, pi_eps, value_keep, pi_keep, shift)]
    sizes.insert(_STREAMS.index("members"), 4)
    groups = min(_INTERPRETED_GROUPS, pow2(cdiv(max(sizes), 4))) if interpreting() else _GROUPS
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + cdiv(size, 4 * groups))
    # No program is a missing tensor's; any pointer of its type stands for it.
    nothing = td_eps.view(torch.uint8)
    launch(
        update_noise_kernel,
        (starts[-1],),
        state,
        td_eps,
        pi_eps,
        td_members,
        pi_members,
        nothing if value_keep is None else value_keep,
        nothing if pi_keep is None else pi_keep,
        td_members if shift is None else shift,
        *(size for name, size in zip(_STREAMS, sizes, strict=True) if name != "members"),
        *starts[1:-1],
        num_q,
        DROPPED=_dropped(p),
        BG=groups,
        pdl=pdl,
        num_warps=4,
    )


def draw_update_noise_reference(
    state: Tensor,
    *,
    td_eps: Tensor,
    pi_eps: Tensor,
    td_members: Tensor,
    pi_members: Tensor,
    num_q: int,
    value_keep: Tensor | None = None,
    pi_keep: Tensor | None = None,
    p: float = 0.0,
    shift: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """`draw_update_noise` in plain torch: the same integers, the same floats to rounding."""
    _check_update(state, td_eps, pi_eps, td_members, pi_members, num_q, value_keep, pi_keep, p, shift)

    def words(name: str, size: int) -> Tensor:
        return stream_words(state, _FIRST_STREAM + _STREAMS.index(name), size)

    for name, x in (("td_eps", td_eps), ("pi_eps", pi_eps)):
        fill_normal(x, words(name, x.numel()))
    for out, pair in zip((td_members, pi_members), distinct_pairs_reference(words("members", 4), num_q), strict=True):
        out.copy_(pair)
    for name, keep in (("value_keep", value_keep), ("pi_keep", pi_keep)):
        if keep is not None:
            word = words(name, keep.numel()).flatten()[: keep.numel()]
            keep.copy_((word >= _dropped(p)).view(keep.shape))
    if shift is not None:
        word = words("shift", shift.numel()).flatten()[: shift.numel()]
        shift.copy_((word * _SHIFTS >> 32).view(shift.shape))
