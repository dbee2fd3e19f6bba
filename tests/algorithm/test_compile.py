"""`compile=true`: the numbers of the uncompiled update, everything compiled once, refusals said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.exc
from conftest import PYTHONPATH, filled_buffer, tiny_config, tiny_multitask
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from tdmpc2_fast import TDMPC2
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import NonFiniteError
from tdmpc2_fast.rng import UpdateNoise, generator
from tdmpc2_fast.runtime.backend import resolve_backend
from tdmpc2_fast.runtime.compiling import can_compile, why_not_compiled

CPU = torch.device("cpu")
CONFIGS = dict(
    plain=tiny_config(dropout=0.2),
    small=tiny_config(num_q=2, horizon=2, num_enc_layers=1),
    episodic=tiny_config(episodic=True),
    multitask=tiny_multitask(dropout=0.2),
)


@pytest.mark.parametrize(
    ("name", "compiler"),
    [("small", "inductor"), ("plain", "aot_eager"), ("episodic", "aot_eager"), ("multitask", "aot_eager")],
)
def test_compiled_once_and_equal_to_the_uncompiled_update(
    name: str, compiler: str, livened: Callable[[TDMPC2], TDMPC2], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aot_eager` traces as `inductor` does and breaks and recompiles where it would, in a tenth of the time.

    So `inductor`, which takes minutes, compiles the policy's losses only, forward and backward.
    """
    if compiler == "inductor" and (why := why_not_compiled(CPU)):
        pytest.skip(why)
    real = torch.compile
    slow = {"_policy_losses": compiler}
    monkeypatch.setattr(torch, "compile", lambda f, **keys: real(f, backend=slow.get(f.__name__, "aot_eager"), **keys))
    monkeypatch.setattr("tdmpc2_fast.learn.torch_update.can_compile", lambda device: True)
    torch._dynamo.reset()
    counters.clear()
    cfg = CONFIGS[name]
    plain, compiled = livened(TDMPC2(cfg)), livened(TDMPC2(cfg.replace(compile=True)))
    buffer, g = filled_buffer(cfg), generator(5, "test", CPU)

    def step() -> None:
        batch, noise = buffer.sample(), UpdateNoise.draw(cfg, g)
        want, got = plain.updater.step(batch, noise), compiled.updater.step(batch, noise)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")

    step()
    assert counters["stats"]["unique_graphs"] == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            step()
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    want = tensors_only(plain.model.state_dict())
    for key, value in tensors_only(compiled.model.state_dict()).items():
        # Adam can turn rounding of a vanishing gradient into a step of lr
        assert torch.isclose(value, want[key], atol=1e-5, rtol=1e-3).float().mean() > 0.99, key


def fail(*_: object) -> None:
    raise torch._inductor.exc.InductorError(OSError(28, "No space left on device"))


@pytest.mark.parametrize("part", ["fw_compiler", "bw_compiler"])
@pytest.mark.parametrize("name", ["plain", "multitask"])
def test_where_the_compiler_fails_it_goes_on_uncompiled_and_alike(
    name: str, part: str, livened: Callable[[TDMPC2], TDMPC2], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward pass, and in the backward pass, which is compiled when the first gradient is asked for."""
    real, compilers = torch.compile, {**dict.fromkeys(("fw_compiler", "bw_compiler"), make_boxed), part: fail}
    monkeypatch.setattr(torch, "compile", lambda f, **keys: real(f, backend=aot_autograd(**compilers), **keys))
    monkeypatch.setattr("tdmpc2_fast.learn.torch_update.can_compile", lambda device: True)
    torch._dynamo.reset()
    cfg = CONFIGS[name]
    plain, compiled = livened(TDMPC2(cfg)), livened(TDMPC2(cfg.replace(compile=True)))
    buffer, other = filled_buffer(cfg), filled_buffer(cfg)
    with pytest.warns(UserWarning, match="compile.*updates run uncompiled.*InductorError") as caught:
        got = [compiled.update(other)["total_loss"].item() for _ in range(3)]
    assert len([w for w in caught if "uncompiled" in str(w.message)]) == 1
    assert got == [plain.update(buffer)["total_loss"].item() for _ in range(3)]
    want = tensors_only(plain.model.state_dict())
    assert all(torch.equal(x, want[k]) for k, x in tensors_only(compiled.model.state_dict()).items())


def make_boxed(graph: Callable[..., object], _: object) -> object:
    return make_boxed_func(graph)


def test_what_is_no_fault_of_the_compiler_is_raised_and_compiling_stays(
    livened: Callable[[TDMPC2], TDMPC2], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr("tdmpc2_fast.learn.torch_update.can_compile", lambda device: True)
    agent = livened(TDMPC2(CONFIGS["plain"].replace(compile=True)))
    with monkeypatch.context() as m:
        m.setattr(agent.model, "critic_logits", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            agent.update(filled_buffer(agent.cfg))
    with torch.no_grad():
        agent.model._reward[0].weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteError, match="reward_loss"):
        agent.update(filled_buffer(agent.cfg))
    assert "_targets" in vars(agent.updater._update)
    assert not recwarn.list


def test_a_folder_for_the_cache_that_cannot_be_made_is_replaced(tmp_path: Path) -> None:
    """In a process of its own: torch looks once. Without it no optimiser could be built, compiled or not."""
    (tmp_path / "file").touch()
    code = """
from conftest import TDMPC2, filled_buffer, tiny_config
cfg = tiny_config()
print("loss", float(TDMPC2(cfg).update(filled_buffer(cfg))["total_loss"]))
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file"), "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("loss "), done.stderr
    assert "TORCHINDUCTOR_CACHE_DIR: torch cannot make this folder (FileExistsError" in done.stderr


def no_compiler() -> None:
    raise RuntimeError("no working C++ compiler")


@pytest.mark.parametrize(
    ("pick", "why"),
    [(lambda: None, "no vector instructions"), (no_compiler, "needs a C.. compiler: RuntimeError: no working")],
)
def test_where_it_cannot_compile_a_warning_says_why(
    pick: Callable[[], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", pick)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match=f"config key 'compile': got True, and updates run uncompiled: .*{why}"):
        assert not can_compile(CPU)


def test_the_triton_backend_says_that_it_has_no_effect() -> None:
    cfg = tiny_config(backend="triton")
    assert "compile" not in resolve_backend(cfg, CPU).why
    assert "compile=true has no effect" in resolve_backend(cfg.replace(compile=True), CPU).why
