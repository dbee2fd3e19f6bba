"""Counter-based random words, and what is made of them, in kernels and in plain torch.

Philox4x32-10 (Salmon et al., SC 2011) turns (key, counter) into four 32-bit words, with no state
but a counter in memory:

    key      the 64-bit seed
    counter  (group of four elements, stream, low and high word of a counter of plans or updates)

Streams in use: 0 to 6 the draws of a plan (plan/noise.py), 16 to 21 those of an update (update/noise.py),
22 the slices of its batch (update/replay_gather.py). Never renumber: a seed means these draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import cdiv, jit, tl

# (word + 1/2) / 2^32 may round to 1, whose logarithm is 0.
_BELOW_ONE = 1 - 2**-24

WORD, BELOW_ONE, HALF_TURNS = tl.constexpr(2**-32), tl.constexpr(_BELOW_ONE), tl.constexpr(2**-31)


@jit
def uniform(word):
    """Return a float32 strictly inside (0, 1), fine near 0 where logarithms are long."""
    return tl.minimum(word.to(tl.float32) * WORD + 0.5 * WORD, BELOW_ONE)


@jit
def _cosine_and_sine(x):
    """Return cos(pi x) and sin(pi x) for x in [-1, 1], within 1e-7: minimax polynomials in an eighth of a turn.

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
def normal_pair(word0, word1):
    """Return two standard normals from two words (Box-Muller)."""
    r = tl.sqrt_rn(tl.maximum(-2.0 * tl.log(uniform(word0)), 0.0))
    # The signed word as half turns.
    cos, sin = _cosine_and_sine(word1.to(tl.int32, bitcast=True).to(tl.float32) * HALF_TURNS)
    return r * cos, r * sin


@jit
def in_range(word, count):
    """Return word * count / 2^32, rounded down: 0 to count - 1 as int64."""
    return (word.to(tl.int64) * count) >> 32


@jit
def distinct_pair(word0, word1, count):
    """Return an ordered pair of distinct numbers of 0 to count - 1, int64."""
    i, j = in_range(word0, count), in_range(word1, count - 1)
    # Of the numbers but i: those from i on move up by one.
    return i, j + (j >= i).to(tl.int64)


@jit
def four(x0, x1, x2, x3):
    """Return four blocks [BG] as consecutive elements [4 BG]."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@jit
def four_words(state_ptr, group, stream):
    """Return the four words of each group [BG] of a stream, with the seed and counter in memory."""
    zero = group * 0
    counter = tl.load(state_ptr + 1)
    return tl.philox(
        tl.load(state_ptr), group, zero + stream, zero + counter.to(tl.int32), zero + (counter >> 32).to(tl.int32)
    )


def check_state(state: Tensor) -> None:
    """Refuse a state that is not a seed and a counter."""
    if state.shape != (2,) or state.dtype != torch.int64 or not state.is_contiguous():
        got = f"shape {tuple(state.shape)} {state.dtype}, strides {state.stride()}"
        raise ValueError(f"state: got {got}, allowed: (2,) torch.int64, contiguous, seed and counter")


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 in plain torch: key (2,) and counters, 32-bit words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key.unbind()
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of m x, from halves of x: the whole does not fit an int64."""
    low = m * (x & 0xFFFF)
    rest = m * (x >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


def stream_words(state: Tensor, stream: int, size: int) -> Tensor:
    """Return the words of the groups that serve `size` elements: (groups, 4) int64."""
    seed, counter = ((x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF) for x in state)
    group = torch.arange(cdiv(size, 4), device=state.device)
    low, high = (x.expand_as(group) for x in counter)
    return torch.stack(philox(torch.stack(seed), (group, torch.full_like(group, stream), low, high)), 1)


def uniform_reference(word: Tensor) -> Tensor:
    """Compute `uniform` in plain torch."""
    return (word.float() * 2**-32 + 2**-33).clamp(max=_BELOW_ONE)


def fill_normal(out: Tensor, words: Tensor) -> None:
    """Fill `out` with standard normals in plain torch, from words (groups, 4)."""
    radius, angle = words.view(-1, 2).unbind(1)
    radius = (-2 * uniform_reference(radius).log()).sqrt()
    # In float64, for pi times a float32 is none.
    angle = ((angle ^ 1 << 31) - (1 << 31)).float().double() * (math.pi * 2**-31)
    pairs = torch.stack([radius * angle.cos().float(), radius * angle.sin().float()], 1)
    out.copy_(pairs.flatten()[: out.numel()].view(out.shape))


def distinct_pairs_reference(words: Tensor, count: int) -> Tensor:
    """Compute `distinct_pair` in plain torch: words (groups, 4) -> (2 groups, 2) int64."""
    word0, word1 = words.view(-1, 2).unbind(1)
    i, j = word0 * count >> 32, word1 * (count - 1) >> 32
    return torch.stack([i, j + (j >= i)], 1)
