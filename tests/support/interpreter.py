"""Imported for its effect: Triton's interpreter in a quarter of its time, with the same numbers.

Its time goes into objects of `triton.language`, not into numpy: at every call of a device function it looks through all
builtins for what it has yet to replace, and every value it makes has a new type with a new shape. Here the launch
replaces the builtins once for all it calls, and equal types are one. Integers that overflow, which the interpreter
works out and then ignores, are errors here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

replace_builtins, look_up_dtype = interpreter._patch_lang, interpreter._get_np_dtype
broadcast = TritonSemantic.broadcast_impl_value
dtype_of_numbers = functools.cache(look_up_dtype)
block_types: dict[tuple[Any, ...], Any] = {}
shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def replace_once(fn: Any) -> Any:
    """Replace the builtins that a function sees, unless they are replaced; return what takes that back."""
    seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
    if any(tl.core.is_builtin(module.load) for module in seen):
        return replace_builtins(fn)
    return interpreter._LangPatchScope()


def dtype_in_numpy(dtype: Any) -> Any:
    """Return the dtype of a block, a number or a pointer in numpy."""
    return look_up_dtype(dtype) if isinstance(dtype.scalar, tl.pointer_type) else dtype_of_numbers(dtype.scalar)


def block_type(scalar: Any, shape: Any) -> Any:
    """Return the type of a block."""
    key = (str(scalar), *getattr(shape, "values", shape))
    if key not in block_types:
        block_types[key] = tl.block_type(scalar, shape)
    return block_types[key]


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    """Make a value, as `tl.tensor.__init__` does."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sides = tuple(type.shape.values) if type.is_block() else ()
    if sides not in shapes:
        shapes[sides] = tl.tuple([tl.constexpr(side) for side in sides]), tl.constexpr(math.prod(sides))
    self.shape, self.numel = shapes[sides]


def broadcast_unless_alike(self: Any, a: Any, b: Any) -> Any:
    """Give two values one shape."""
    if a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values:
        return a, b
    return broadcast(self, a, b)


def refuse_overflow(self: Any, a: Any, b: Any, operation: Any) -> None:
    """Refuse a sum, difference or product of signed integers that does not fit; random numbers wrap around unsigned."""
    dtype = a.type.scalar
    if dtype.is_int_signed() and dtype.int_bitwidth < 64:
        wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](
            a.handle.data.astype(np.int64), b.handle.data.astype(np.int64)
        )
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert wide.min() >= least and wide.max() <= most, f"{dtype} overflows in {operation.__name__}"  # noqa: PT018


interpreter._patch_lang = replace_once
interpreter._get_np_dtype = dtype_in_numpy
interpreter.InterpreterBuilder.get_block_ty = lambda self, scalar, shape: block_type(scalar, shape)
tl.block_type.with_element_ty = lambda self, scalar: block_type(scalar, self.shape)
tl.tensor.__init__ = make_tensor
TritonSemantic.broadcast_impl_value = broadcast_unless_alike
TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow
