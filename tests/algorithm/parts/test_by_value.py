"""Tensors by value, as copies and pickles take them."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from tdmpc2_fast.runtime.by_value import by_value, from_values


def test_every_kind_of_tensor_comes_back_bit_for_bit() -> None:
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
    given = {str(kind): torch.tensor([[0, 1, 3], [1, 2, 0]]).to(kind).T for kind in kinds}
    given |= dict(nan=torch.tensor([torch.nan, -0.0]), none=torch.zeros(0, 2), one=torch.tensor(7))
    found = from_values(pickle.loads(pickle.dumps(by_value(given))))
    assert found.keys() == given.keys()
    for name, x in given.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        bits = [np.asarray(t.contiguous().reshape(-1).view(torch.uint8)) for t in (found[name], x)]
        np.testing.assert_array_equal(*bits)
