"""Imported for its effect: products of float32 by the instructions the recorded numbers were made with.

With AVX-512, Intel's MKL sums in another order, and even the plain reference is then, in two of 758 arrays, further
from the recorded values than the limits, which come from what the official code moved between other instruction
sets (docs/parity.md). MKL reads this before its first product.
"""

from __future__ import annotations

import os

os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")
