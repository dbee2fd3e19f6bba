"""The official code and the JAX port as they are imported from a checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from tdmpc2_fast.benchmarks.baselines import jax_port, official
from tdmpc2_fast.benchmarks.harness.agents import agent_of, batch_of
from tdmpc2_fast.benchmarks.harness.measure import CannotMeasureError
from tdmpc2_fast.compat.draws import given, plan_order
from tdmpc2_fast.rng import PlanNoise, generator

CPU = torch.device("cpu")


FAKE = {
    "tdmpc2.py": "from common import helper\nDEVICE = 'cuda:0'\nADAM = dict(capturable=True)\nVALUE = helper.value()\n",
    "common/__init__.py": "",
    "common/helper.py": "def value():\n    return 'cuda:0'\n",
}


def test_official_sources_are_loaded_for_the_device_and_leave_nothing_behind(tmp_path: Path) -> None:
    for name, text in FAKE.items():
        path = tmp_path / "tdmpc2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules)
    module = official.load_official(str(tmp_path), CPU)
    assert module.DEVICE == module.VALUE == "cpu"
    assert dict(capturable=False) == module.ADAM
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("tdmpc2", "common")}
    assert sys.meta_path[0].__class__.__name__ != "_Sources"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["__init__.py", "helper.py", "tdmpc2.py"]
    (tmp_path / "tdmpc2" / "tdmpc2.py").write_text("import no_such_package_anywhere\n")
    with pytest.raises(CannotMeasureError, match="needs no_such_package_anywhere, which is not installed"):
        official.load_official(str(tmp_path), CPU)


def test_draws_are_handed_out_in_order_and_checked() -> None:
    draws = [torch.full((2,), float(i)) for i in range(3)]
    with given(iter(draws)):
        assert torch.randn_like(torch.zeros(2))[0] == 0
        assert torch.empty(2).exponential_()[0] == 1
        with pytest.raises(RuntimeError, match=r"random numbers of \(3,\), the official code of \(2,\)"):
            torch.randn_like(torch.zeros(3))
    cfg = tiny_config()
    noise = PlanNoise.draw(cfg, 1, generator(0, "x", CPU))
    count = cfg.horizon + 3 * cfg.effective_iterations + 2
    assert len(list(plan_order(noise))) == count


CALLED = {
    "tdmpc2.py": "from common import helper\n\ndef value(x):\n    return helper.twice(x) + 1\n",
    "common/__init__.py": "",
    "common/helper.py": "SCALE = FACTOR\n\ndef twice(x):\n    return SCALE[0] * x\n",
}


def test_modules_loaded_more_than_once_are_compiled_each_with_its_own_globals(tmp_path: Path) -> None:
    modules = []
    for factor in (2.0, 3.0):
        for name, text in CALLED.items():
            path = tmp_path / "tdmpc2" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("FACTOR", f"[{factor}]"))
        modules.append(official.load_official(str(tmp_path), CPU))
    for module, wanted in zip(modules, (3.0, 4.0), strict=True):
        compiled = torch.compile(module.value, backend="eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [wanted, wanted]


@pytest.mark.skipif("OFFICIAL" not in os.environ, reason="OFFICIAL names no checkout of the official code")
def test_the_official_code_plans_and_learns_the_same() -> None:
    agent = agent_of(tiny_config(simnorm_dim=8))
    obs = torch.randn(5)
    noise = PlanNoise.draw(agent.cfg, 1, generator(0, "x", CPU))
    plan = official.official_plan(os.environ["OFFICIAL"], agent, obs, noise)
    learn = official.official_update(os.environ["OFFICIAL"], agent, batch_of(agent.cfg, CPU))
    for gate in (plan.gate, learn.gate):
        assert gate is not None
        assert gate().passed


def test_the_jax_port_says_what_it_lacks(tmp_path: Path) -> None:
    agent = agent_of(tiny_config())
    with pytest.raises(CannotMeasureError, match="one width"):
        jax_port.plan_variant(str(tmp_path), agent, torch.zeros(1, 5))
    square = agent_of(tiny_config(mlp_dim=16))
    with pytest.raises(CannotMeasureError, match=r"the JAX port needs \w+.*, which is not installed"):
        jax_port.plan_variant(str(tmp_path), square, torch.zeros(1, 5))
    assert str(tmp_path) not in sys.path


@pytest.mark.skipif("JAX_PORT" not in os.environ, reason="JAX_PORT names no checkout of the JAX port")
def test_the_jax_port_has_the_same_model() -> None:
    agent = agent_of(tiny_config(mlp_dim=16, dropout=0.0))
    variant = jax_port.plan_variant(os.environ["JAX_PORT"], agent, torch.randn(3, 5))
    variant.run()
    assert variant.gate is not None
    assert variant.gate().passed
