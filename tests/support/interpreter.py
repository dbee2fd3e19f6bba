"""Imported for its effect: Triton's interpreter takes half the time and does the same.

At every call of a device function it looks through all of `triton.language` for what it has yet to replace, though the
launch around it has replaced everything; and at every value it makes, it writes its table of dtypes anew.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

replace_builtins, look_up = interpreter._patch_lang, interpreter._get_np_dtype
of_numbers = functools.cache(look_up)


def replace_once(fn: Any) -> Any:
    """Replace the builtins that a function sees, unless they are replaced; return what takes that back."""
    seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
    if any(tl.core.is_builtin(module.load) for module in seen):
        return replace_builtins(fn)
    return interpreter._LangPatchScope()


def dtype_in_numpy(dtype: Any) -> Any:
    """Return the dtype of a block, a number or a pointer in numpy; of numbers it is looked up once."""
    return look_up(dtype) if isinstance(dtype.scalar, tl.pointer_type) else of_numbers(dtype.scalar)


interpreter._patch_lang = replace_once
interpreter._get_np_dtype = dtype_in_numpy
