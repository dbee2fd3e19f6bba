"""dm_control's soft indicator `rewards.tolerance`, bit for bit, with all that is fixed worked out beforehand.

Transcendental functions are numpy's even for one number: the C library's may round differently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Value = Callable[[float], float]
INF = float("inf")


def tolerance(
    lower: float,
    upper: float,
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
    of_array: bool = False,
) -> Value:
    """Return the function that is 1 for a number within bounds and falls to `value_at_margin` at `margin` outside.

    of_array: whether dm_control's is called with an array, whose squares it rounds differently.
    """
    if margin == 0:
        return lambda x: 1.0 if lower <= x <= upper else 0.0
    shape = _SHAPES[sigmoid](value_at_margin, of_array)

    def value(x: float) -> float:
        if lower <= x <= upper:
            return 1.0
        return shape((lower - x if x < lower else x - upper) / margin)

    return value


def _gaussian(at_margin: float, of_array: bool) -> Value:
    scale, exp = float(np.sqrt(-2 * np.log(at_margin))), np.exp
    if of_array:
        return lambda x: float(exp(-0.5 * ((x * scale) * (x * scale))))
    return lambda x: float(exp(-0.5 * (x * scale) ** 2))


def _linear(at_margin: float, of_array: bool) -> Value:
    scale = 1 - at_margin

    def shape(x: float) -> float:
        x *= scale
        return 1 - x if abs(x) < 1 else 0.0

    return shape


_SHAPES: dict[str, Callable[[float, bool], Value]] = {"gaussian": _gaussian, "linear": _linear}
