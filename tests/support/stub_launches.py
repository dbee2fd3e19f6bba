"""Launches a small plan and update through Triton's own launcher on a driver without a GPU (stub_driver.c).

    STUB_LOG=FILE python stub_launches.py

Prints, as JSON, what each launch should have been by its arguments; the stub writes what came.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from tdmpc2_fast.kernels.device.launch import How, Launch, Precision, log_launches
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.plan.buffers import PlanWeights
from tdmpc2_fast.kernels.plan.chain import PlanChain
from tdmpc2_fast.kernels.update.chain import UpdateChain

NARROW = dict(obs_dim=11, latent_dim=64, mlp_dim=256, enc_dim=64, num_enc_layers=2, num_q=3, num_bins=21)


def use_stub() -> None:
    """Have Triton launch by whatever `libcuda.so.1` there is, on memory of the CPU."""
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: (9, 0)
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)


def words(value: Any) -> list[list[int]]:
    """Return size and bits of each parameter that a value is: none of a constant, those of all entries of a tuple."""
    if isinstance(value, tuple):
        return [word for entry in value for word in words(entry)]
    if value is None or (type(value) is int and value == 1):
        return []
    if isinstance(value, Tensor):
        return [[8, value.data_ptr()]]
    if isinstance(value, bool):
        return [[1, int(value)]]
    if isinstance(value, float):
        return [[4, struct.unpack("I", struct.pack("f", value))[0]]]
    size = 4 if -(2**31) <= value < 2**31 else 8
    return [[size, ctypes.c_uint64(value).value % 2 ** (8 * size)]]


def expected(launch: Launch) -> dict[str, Any]:
    """Return what the driver should be told of a launch."""
    names = [x.name for x in launch.kernel.params if not x.is_constexpr]
    values = launch.arguments()
    return dict(
        name=launch.name,
        grid=[*launch.grid, 1, 1][:3],
        threads=32 * launch.options.get("num_warps", 4),
        early=bool(launch.options.get("launch_pdl")),
        cluster=launch.cluster,
        params=[word for name in names for word in words(values[name])],
    )


def main() -> None:
    """Launch, and print what was launched."""
    use_stub()
    cpu, precision = torch.device("cpu"), Precision(sys.argv[1])
    how = How.of_chip(90, precision)
    with log_launches() as log:
        if sys.argv[2] == "plan":
            few: dict[str, Any] = dict(iterations=2, num_samples=64, num_pi_trajs=8, num_elites=8, horizon=2)
            sizes = replace(plan_sizes(1, 2, 3), **NARROW, **few)
            PlanChain(sizes, PlanWeights.empty(sizes, precision, cpu), how, cpu).run()
        else:
            UpdateChain(replace(update_sizes(1, 3), **NARROW, batch=32, horizon=2), how, cpu).run()
    assert math.prod(log[0].grid) > 0
    print(json.dumps([expected(launch) for launch in log]))


if __name__ == "__main__":
    main()
