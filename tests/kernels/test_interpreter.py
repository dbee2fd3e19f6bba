"""The interpreter that tests run on refuses what wraps around on a device, where that is a mistake."""

from __future__ import annotations

import pytest
import torch

from tdmpc2_fast.kernels.device.launch import interpreting, jit, launch, tl

if not interpreting():
    pytest.skip("kernels are compiled here", allow_module_level=True)


@jit
def squares_kernel(x_ptr, PDL: tl.constexpr):
    at = x_ptr + tl.arange(0, 2)
    x = tl.load(at)
    tl.store(at, x * x)


@pytest.mark.parametrize(("dtype", "refused"), [("int32", True), ("uint32", False), ("int64", False)])
def test_signed_integers_may_not_overflow(dtype: str, refused: bool) -> None:
    x = torch.tensor([3, 2**20], dtype=getattr(torch, dtype))
    if refused:
        with pytest.raises(Exception, match="int32 overflows in mul"):
            launch(squares_kernel, (1,), x, pdl=False)
    else:
        launch(squares_kernel, (1,), x, pdl=False)
        assert x.tolist() == [9, 2**40 if dtype == "int64" else 0]
