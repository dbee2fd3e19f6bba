"""From the logits of some rows, in registers, to their scalars or actions: the device code of all heads."""

from __future__ import annotations

from ..device.arithmetic import symexp, tanh
from ..device.launch import jit, tl
from ..device.pointers import entry_ptrs, row_offsets, row_ptrs

SCALARS, ACTIONS = 1, 2
"""What logits stand for."""


@jit
def bin_values(cols, K, vmin, vmax):
    """Return the centres of the K bins in columns `cols`, 0 beyond."""
    width = (vmax - vmin) / (K - 1)
    # From the nearer end, as torch.linspace: both ends and the middle are exact.
    bins = tl.where(cols < K // 2, vmin + width * cols, vmax - width * (K - 1 - cols))
    return tl.where(cols < K, bins, 0.0)


@jit
def scalar_of(logits, cols, K, vmin, vmax, BINS: tl.constexpr):
    """Return the scalar that each row of logits [BM, BK] stands for: [BM], and its gradient [BM, BK].

    BINS as `num_bins` in two_hot.py. A gradient that is not used is not computed.
    """
    if BINS > 1:
        logits = tl.where((cols < K)[None, :], logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        bins = bin_values(cols, K, vmin, vmax)
        total = tl.sum(p, axis=1)
        v = tl.sum(p * bins[None, :], axis=1) / total
        d = tl.exp(tl.abs(v))[:, None] * (p / total[:, None]) * (bins[None, :] - v[:, None])
        return symexp(v), d
    x = tl.sum(tl.where((cols < 1)[None, :], logits, 0.0), axis=1)
    slope = tl.zeros_like(x) + 1.0
    if BINS == 1:
        slope = tl.exp(tl.abs(x))
        x = symexp(x)
    return x, tl.broadcast_to(slope[:, None], (logits.shape[0], logits.shape[1]))


@jit
def store_scalars(logits, cols, K, y, g, rows, row_ok, n, vmin, vmax, BINS: tl.constexpr):
    """Store the scalar of each row of logits [BM, BK]; return their gradients [BM, BK]."""
    scalar, gradient = scalar_of(logits, cols, K, vmin, vmax, BINS)
    tl.store(row_ptrs(y, g, rows, n), scalar, mask=row_ok)
    return gradient


@jit
def store_actions(logits, A, eps, mask_ptr, y, rows, row_ok, n, low, high, HAS_MASK: tl.constexpr):
    """Store the action of each row of logits [BM, 2 BA], which are mean 0, log std 0, mean 1 and so on."""
    BM: tl.constexpr = logits.shape[0]
    BA: tl.constexpr = logits.shape[1] // 2
    center, log_std = tl.split(tl.reshape(logits, (BM, BA, 2)))  # [BM, BA] each
    log_std = low + 0.5 * (high - low) * (tanh(log_std) + 1.0)
    dims = tl.arange(0, BA)
    ok = row_ok[:, None] & (dims < A)[None, :]
    noise = tl.load(entry_ptrs(eps, 0, rows, n, dims), mask=ok, other=0.0)
    if HAS_MASK:
        live = tl.load(mask_ptr + row_offsets(rows, n, A, 0)[:, None] + dims[None, :], mask=ok, other=0.0)
        center, log_std, noise = center * live, log_std * live, noise * live
    action = tanh(center + noise * tl.exp(log_std))
    tl.store(entry_ptrs(y, 0, rows, n, dims), action, mask=ok)
