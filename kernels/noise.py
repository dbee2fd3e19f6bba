"""All draws of a plan in one launch, from a random stream that lives on the device.

Philox4x32-10 (Salmon et al., SC 2011) turns (key, counter) into four 32-bit words, with no state
but a plan counter in memory, so a captured graph draws anew at every replay:

    key      the 64-bit seed
    counter  (group of four elements, tensor, low and high word of the plan counter)

One call serves four consecutive elements of a tensor. Normals are Box-Muller pairs, exponentials
-log u, pairs of critics and pixel shifts words scaled down to their range. Cost: about 70 integer
and as many float instructions for four elements, 16 bytes written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import cdiv, interpreting, jit, launch, pow2, tl
from .linear_tile import await_producers

# Streams of one plan, in the order of the grid. Never renumber: a seed means these draws.
_NORMALS = ("pi_eps", "samples", "value_eps", "action")
_STREAMS = (*_NORMALS, "elite", "members", "shift")

_SHIFTS = 7
# Groups of four a program. The interpreter pays by the number of operations, not by their size.
_GROUPS = 256
_INTERPRETED_GROUPS = 16384

# (word + 1/2) / 2^32 may round to 1, whose logarithm is 0.
_BELOW_ONE = 1 - 2**-24
_LEAST_EXPONENTIAL = 2**-24

SHIFTS, WORD, BELOW_ONE = tl.constexpr(_SHIFTS), tl.constexpr(2**-32), tl.constexpr(_BELOW_ONE)
LEAST_EXPONENTIAL, HALF_TURNS = tl.constexpr(_LEAST_EXPONENTIAL), tl.constexpr(2**-31)


@jit
def _uniform(word):
    """A float32 strictly inside (0, 1), fine near 0 where logarithms are long."""
    return tl.minimum(word.to(tl.float32) * WORD + 0.5 * WORD, BELOW_ONE)


@jit
def _cosine_and_sine(x):
    """cos(pi x) and sin(pi x) for x in [-1, 1], within 1e-7: minimax polynomials in an eighth of a turn.

    The ones of CUDA's library bring a reduction for large arguments, which needs a stack.
    """
    quarter = tl.floor(2.0 * x + 0.5)
    x -= 0.5 * quarter  # exact; in [-1/4, 1/4]
    q = quarter.to(tl.int32)
    s = x * x
    c = ((0.23314662 * s - 1.33524) * s + 4.0587134) * s - 4.934802
    c = c * s + 1.0
    d = (-0.59161663 * s + 2.5499854) * s - 5.1677122
    d = (x * s) * d + x * 3.1415927
    cos, sin = tl.where((q & 1) == 0, c, -d), tl.where((q & 1) == 0, d, c)
    return tl.where((q & 2) == 0, cos, -cos), tl.where((q & 2) == 0, sin, -sin)


@jit
def _normal_pair(word0, word1):
    """Two standard normals from two words (Box-Muller)."""
    r = tl.sqrt_rn(tl.maximum(-2.0 * tl.log(_uniform(word0)), 0.0))
    # The signed word as half turns.
    cos, sin = _cosine_and_sine(word1.to(tl.int32, bitcast=True).to(tl.float32) * HALF_TURNS)
    return r * cos, r * sin


@jit
def _in_range(word, count):
    """word * count / 2^32, rounded down: 0 to count - 1 as int64."""
    return (word.to(tl.int64) * count) >> 32


@jit
def _four(x0, x1, x2, x3):
    """Four blocks [BG] as consecutive elements [4 BG]."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


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
    zero = group * 0
    plan = tl.load(state_ptr + 1)
    words = tl.philox(
        tl.load(state_ptr), group, zero + stream, zero + plan.to(tl.int32), zero + (plan >> 32).to(tl.int32)
    )
    element = (program - at).to(tl.int64) * (4 * BG) + tl.arange(0, 4 * BG)
    ok = element < size
    w0, w1, w2, w3 = words
    if stream < 4:
        x0, x1 = _normal_pair(w0, w1)
        x2, x3 = _normal_pair(w2, w3)
        tl.store(normal_ptr + element, _four(x0, x1, x2, x3), mask=ok)
    elif stream == 4:
        x = -tl.log(_uniform(_four(w0, w1, w2, w3)))
        tl.store(elite_ptr + element, tl.maximum(x, LEAST_EXPONENTIAL), mask=ok)
    elif stream == 5:
        i0, i2 = _in_range(w0, num_q), _in_range(w2, num_q)
        j1, j3 = _in_range(w1, num_q - 1), _in_range(w3, num_q - 1)
        # Of the critics but i: those from i on move up by one.
        pair = _four(i0, j1 + (j1 >= i0).to(tl.int64), i2, j3 + (j3 >= i2).to(tl.int64))
        tl.store(members_ptr + (element >> 1) * members_row + (element & 1), pair, mask=ok)
    else:
        tl.store(shift_ptr + element, _in_range(_four(w0, w1, w2, w3), SHIFTS), mask=ok)


def _check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what the kernel would fill wrongly."""
    if x.dtype != dtype or x.device != device or not x.is_contiguous() or x.numel() >= 2**31:
        layout = "contiguous" if x.is_contiguous() else f"strides {x.stride()}"
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}, {layout}"
        raise ValueError(f"{name}: got {got}, allowed: {dtype} on {device}, contiguous, fewer than 2**31 elements")


def _check_plan(
    state: Tensor, normals: dict[str, Tensor], elite: Tensor, members: Tensor, num_q: int, shift: Tensor | None
) -> None:
    _check("state", state, torch.int64, state.device)
    if state.shape != (2,):
        raise ValueError(f"state: got shape {tuple(state.shape)}, allowed: (2,), seed and counter")
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


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 in plain torch: key (2,) and counters, 32-bit words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key.unbind()
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of m x, in halves of x, for the whole does not fit an int64."""
    low = m * (x & 0xFFFF)
    rest = m * (x >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


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
        """(groups, 4) words of a tensor."""
        seed, plan = ((x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF) for x in state)
        group = torch.arange(cdiv(size, 4), device=state.device)
        stream = torch.full_like(group, _STREAMS.index(name))
        low, high = (x.expand_as(group) for x in plan)
        return torch.stack(philox(torch.stack(seed), (group, stream, low, high)), 1)

    def uniform(word: Tensor) -> Tensor:
        return (word.float() * 2**-32 + 2**-33).clamp(max=_BELOW_ONE)

    for name, x in normals.items():
        radius, angle = words(name, x.numel()).view(-1, 2).unbind(1)
        radius = (-2 * uniform(radius).log()).sqrt()
        # In float64, for pi times a float32 is none.
        angle = ((angle ^ 1 << 31) - (1 << 31)).float().double() * (math.pi * 2**-31)
        pairs = torch.stack([radius * angle.cos().float(), radius * angle.sin().float()], 1)
        x.copy_(pairs.flatten()[: x.numel()].view(x.shape))
    word = words("elite", elite.numel()).flatten()[: elite.numel()]
    elite.copy_(uniform(word).log().neg().clamp(min=_LEAST_EXPONENTIAL).view(elite.shape))
    word0, word1 = words("members", members.numel()).view(-1, 2)[: len(members)].unbind(1)
    i, j = word0 * num_q >> 32, word1 * (num_q - 1) >> 32
    members.copy_(torch.stack([i, j + (j >= i)], 1))
    if shift is not None:
        word = words("shift", shift.numel()).flatten()[: shift.numel()]
        shift.copy_((word * _SHIFTS >> 32).view(shift.shape))
