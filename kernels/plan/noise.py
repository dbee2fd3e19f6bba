"""All draws of a plan in one launch, from a random stream that lives on the device.

Philox (philox.py) needs no state but a plan counter in memory, so a captured graph draws anew at
every replay. One call serves four consecutive elements of a tensor. Normals are Box-Muller pairs,
exponentials -log u, pairs of critics and pixel shifts words scaled down to their range. Cost: about
70 integer and as many float instructions for four elements, 16 bytes written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.launch import await_producers, cdiv, interpreting, jit, launch, pow2, tl
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
    uniform,
    uniform_reference,
)

# Streams of one plan, in the order of the grid. Never renumber: a seed means these draws.
_NORMALS = ("pi_eps", "samples", "value_eps", "action")
_STREAMS = (*_NORMALS, "elite", "members", "shift")

_SHIFTS = 7
# Groups of four a program. The interpreter pays by the number of operations, not by their size.
_GROUPS = 256
_INTERPRETED_GROUPS = 16384

# The largest uniform is below 1, but an approximate logarithm of it may be 0.
_LEAST_EXPONENTIAL = 2**-24

SHIFTS, LEAST_EXPONENTIAL = tl.constexpr(_SHIFTS), tl.constexpr(_LEAST_EXPONENTIAL)


@jit
def noise_kernel(
    state_ptr,
    pi_eps_ptr,
    samples_ptr,
    value_eps_ptr,
    action_ptr,
    elite_ptr,
    members_ptr,
    shift_ptr,
    pi_eps_n,
    samples_n,
    value_eps_n,
    action_n,
    elite_n,
    members_n,
    shift_n,
    samples_at,
    value_eps_at,
    action_at,
    elite_at,
    members_at,
    shift_at,
    members_row,
    num_q,
    BG: tl.constexpr,
    PDL: tl.constexpr,
):
    """BG groups of four elements of one tensor; grid (programs of all tensors in turn,)."""
    await_producers(PDL)
    program = tl.program_id(0)
    # *_at: the first program of a tensor. The last one that has begun is this program's.
    stream = 0
    at = 0
    size = pi_eps_n
    normal_ptr = pi_eps_ptr
    if program >= samples_at:
        stream = 1
        at = samples_at
        size = samples_n
        normal_ptr = samples_ptr
    if program >= value_eps_at:
        stream = 2
        at = value_eps_at
        size = value_eps_n
        normal_ptr = value_eps_ptr
    if program >= action_at:
        stream = 3
        at = action_at
        size = action_n
        normal_ptr = action_ptr
    if program >= elite_at:
        stream = 4
        at = elite_at
        size = elite_n
    if program >= members_at:
        stream = 5
        at = members_at
        size = members_n
    if program >= shift_at:
        stream = 6
        at = shift_at
        size = shift_n

    group = (program - at) * BG + tl.arange(0, BG)  # [BG]
    element = (program - at).to(tl.int64) * (4 * BG) + tl.arange(0, 4 * BG)
    ok = element < size
    w0, w1, w2, w3 = four_words(state_ptr, group, stream)
    if stream < 4:
        x0, x1 = normal_pair(w0, w1)
        x2, x3 = normal_pair(w2, w3)
        tl.store(normal_ptr + element, four(x0, x1, x2, x3), mask=ok)
    elif stream == 4:
        x = -tl.log(uniform(four(w0, w1, w2, w3)))
        tl.store(elite_ptr + element, tl.maximum(x, LEAST_EXPONENTIAL), mask=ok)
    elif stream == 5:
        i0, j1 = distinct_pair(w0, w1, num_q)
        i2, j3 = distinct_pair(w2, w3, num_q)
        pair = four(i0, j1, i2, j3)
        tl.store(members_ptr + (element >> 1) * members_row + (element & 1), pair, mask=ok)
    else:
        tl.store(shift_ptr + element, in_range(four(w0, w1, w2, w3), SHIFTS), mask=ok)


def _check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what the kernel would fill wrongly."""
    if x.dtype != dtype or x.device != device or not x.is_contiguous() or x.numel() >= 2**31:
        layout = "contiguous" if x.is_contiguous() else f"strides {x.stride()}"
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}, {layout}"
        raise ValueError(f"{name}: got {got}, allowed: {dtype} on {device}, contiguous, fewer than 2**31 elements")


def _check_plan(
    state: Tensor, normals: dict[str, Tensor], elite: Tensor, members: Tensor, num_q: int, shift: Tensor | None
) -> None:
    check_state(state)
    if num_q < 2:
        raise ValueError(f"num_q: got {num_q}, allowed: at least 2, a pair of critics is drawn")
    for name, x in (*normals.items(), ("elite", elite)):
        _check(name, x, torch.float32, state.device)
    if members.ndim != 2 or members.shape[1] != 2 or members.stride(1) != 1:
        got = f"shape {tuple(members.shape)}, strides {members.stride()}"
        raise ValueError(f"members: got {got}, allowed: (I, 2), each pair contiguous")
    _check("members", members[:0], torch.int64, state.device)
    if shift is not None:
        _check("shift", shift, torch.int64, state.device)


def draw_plan_noise(
    state: Tensor,
    *,
    pi_eps: Tensor,
    samples: Tensor,
    value_eps: Tensor,
    action: Tensor,
    elite: Tensor,
    members: Tensor,
    num_q: int,
    shift: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Fill the tensors of a `PlanNoise` (rng.py), in place and in one launch.

    Args:
        state: (2,) int64 seed and plan counter; the last kernel of a plan counts, not this one.
        pi_eps: out: (E, H, P, A) standard normal.
        samples: out: (I, E, H, N-P, A) standard normal.
        value_eps: out: (I, E, N, A) standard normal.
        action: out: (E, A) standard normal.
        elite: out: (E, num_elites) Exp(1).
        members: out: (I, 2) int64, two distinct critics of `num_q`, ordered; rows of any stride.
        num_q: number of critics, at least 2.
        shift: out: (E, 1, 1, 2) int64, 0 to 6.
        pdl: programmatic dependent launch.

    Floats are float32; all tensors but `members` are contiguous; all are on one device, and may be
    empty.
    """
    normals = dict(pi_eps=pi_eps, samples=samples, value_eps=value_eps, action=action)
    _check_plan(state, normals, elite, members, num_q, shift)
    outs = [*normals.values(), elite, members, *(() if shift is None else (shift,))]
    sizes = [x.numel() for x in outs] + [0] * (len(_STREAMS) - len(outs))
    groups = min(_INTERPRETED_GROUPS, pow2(cdiv(max(sizes), 4))) if interpreting() else _GROUPS
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + cdiv(size, 4 * groups))
    launch(
        noise_kernel,
        (starts[-1],),
        state,
        *outs[:6],
        members if shift is None else shift,  # no program is the shift's then
        *sizes,
        *starts[1:-1],
        members.stride(0),
        num_q,
        BG=groups,
        pdl=pdl,
        num_warps=4,
    )


def draw_plan_noise_reference(
    state: Tensor,
    *,
    pi_eps: Tensor,
    samples: Tensor,
    value_eps: Tensor,
    action: Tensor,
    elite: Tensor,
    members: Tensor,
    num_q: int,
    shift: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """`draw_plan_noise` in plain torch: the same integers, the same floats to rounding."""
    normals = dict(pi_eps=pi_eps, samples=samples, value_eps=value_eps, action=action)
    _check_plan(state, normals, elite, members, num_q, shift)

    def words(name: str, size: int) -> Tensor:
        return stream_words(state, _STREAMS.index(name), size)

    for name, x in normals.items():
        fill_normal(x, words(name, x.numel()))
    word = words("elite", elite.numel()).flatten()[: elite.numel()]
    elite.copy_(uniform_reference(word).log().neg().clamp(min=_LEAST_EXPONENTIAL).view(elite.shape))
    members.copy_(distinct_pairs_reference(words("members", members.numel()), num_q)[: len(members)])
    if shift is not None:
        word = words("shift", shift.numel()).flatten()[: shift.numel()]
        shift.copy_((word * _SHIFTS >> 32).view(shift.shape))
