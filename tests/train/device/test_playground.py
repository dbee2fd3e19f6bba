"""MuJoCo Playground: what each environment plays is what Playground itself computes, and runs on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.envs import SUITES, make_env, suite_of
from tdmpc2_fast.train.envs.base import RenderError
from tdmpc2_fast.train.envs.device import playground
from tdmpc2_fast.train.run.trainer import OnlineTrainer

CPU = torch.device("cpu")
TASK = "playground:CartpoleBalance"  # the quickest to compile
SEEDS = [3, 2**31 - 5, 70]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(task="playground:CheetaRun"), "unknown task .*CheetaRun'. Did you mean 'playground:CheetahRun'"),
        (dict(task="playground:Go1Handstand"), "unknown task 'playground:Go1Handstand'"),
        (dict(obs="rgb"), "config key 'obs': got 'rgb', allowed: 'state' for playground:CartpoleBalance"),
        (dict(env_kwargs=dict(engine="brax")), "config key 'env.engine': got 'brax', allowed in .*: env.engine=mjx"),
        (dict(env_kwargs=dict(gain=2)), "config key 'env.gain': got 2, allowed in .*: env.engine=mjx or warp"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_told_without_the_package(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    with pytest.raises(ConfigError, match=why):
        make_env(Config(**{"task": TASK, **changes}), 1)


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "tdmpc2_fast.train.envs.device.mjx", raising=False)
    with pytest.raises(ConfigError) as e:
        make_env(Config(task=TASK), 1)
    assert str(e.value) == f"config key 'task': {TASK!r} needs jax; pip install 'tdmpc2-fast[playground]'"
    monkeypatch.setattr(playground.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'env\.engine': 'warp' needs warp; pip install warp-lang"):
        make_env(Config(task=TASK, env_kwargs=dict(engine="warp")), 1)


def test_its_names_are_a_suite_of_their_own() -> None:
    assert suite_of(TASK) is SUITES["Playground"]
    assert len(playground.TASKS) == 25


@pytest.fixture(scope="module")
def simulator() -> Any:
    pytest.importorskip("mujoco_playground")
    from tdmpc2_fast.train.envs.device.mjx import Playground

    return Playground


@pytest.mark.slow
class TestPlayground:
    """Where it is installed. Compiling takes a minute."""

    def test_all_its_dm_control_tasks_are_here_with_episodes_of_500_decisions(self, simulator: Any) -> None:
        from mujoco_playground import dm_control_suite as suite

        assert {f"playground:{name}" for name in suite.ALL_ENVS} == {*playground.TASKS}
        assert {suite.get_default_config(name).episode_length for name in suite.ALL_ENVS} == {1000}

    def test_every_task_can_be_traced_and_no_function_of_it_needs_compiling_twice(self, simulator: Any) -> None:
        import jax

        def types(state: Any) -> list[Any]:
            return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]

        refused = {}
        for name in playground.TASKS:
            try:
                envs = simulator(name.removeprefix("playground:"), "jax", SEEDS, CPU)
            except ConfigError as e:  # of versions of Playground and MuJoCo that do not fit
                refused[name] = str(e)
                continue
            begun = envs._form
            actions = jax.ShapeDtypeStruct((3, envs.action_dim), "float32")
            state, obs, reward = jax.eval_shape(envs._task.decide, begun, actions)
            assert types(state) == types(begun), name
            assert jax.tree.structure(state) == jax.tree.structure(begun)
            assert (obs.shape, reward.shape) == ((3, *envs.obs_shape), (3,))
            assert envs.max_episode_steps == 500
        assert {*refused} <= {"playground:ReacherEasy", "playground:ReacherHard"}
        assert all(f"config key 'task': {name} cannot be made by jax on cpu: " in why for name, why in refused.items())

    def test_functions_are_compiled_once(self, simulator: Any) -> None:
        envs = simulator("CartpoleBalance", "jax", [5] * 4, CPU)
        sizes = [f._cache_size() for f in (envs._task.begin, envs._task.merge, envs._task.decide)]
        envs.reset(torch.ones(4, dtype=torch.bool))
        for _ in range(3):
            envs.step(torch.zeros(4, 1))
            envs.reset(torch.tensor([True, False, True, False]))
            envs.load_state({k: x.clone() for k, x in envs.state().items()})
        after = [f._cache_size() for f in (envs._task.begin, envs._task.merge, envs._task.decide)]
        assert [b - a for a, b in zip(sizes, after, strict=True)] == [1, 1, 1]

    def test_a_decision_is_two_steps_of_playground(self, simulator: Any) -> None:
        import jax
        from mujoco_playground import dm_control_suite as suite

        envs = simulator("CartpoleBalance", "jax", SEEDS, CPU)
        assert (envs.obs_shape, envs.action_dim, envs.max_episode_steps, envs.action_repeat) == ((5,), 1, 500, 2)
        assert envs.frames_per_second == 50
        env = suite.load("CartpoleBalance", config_overrides={"impl": "jax"})
        reset, step = jax.jit(env.reset), jax.jit(env.step)
        actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, 1)).astype(np.float32)
        first = envs.reset(torch.ones(3, dtype=torch.bool))
        found = [envs.step(torch.from_numpy(a)) for a in actions]
        for i, seed in enumerate(SEEDS):
            state = reset(jax.random.fold_in(jax.random.PRNGKey(seed), 0))
            np.testing.assert_allclose(first[i], state.obs, atol=1e-6)
            for a, answer in zip(actions, found, strict=True):
                state = step(state, a[i])
                reward = float(state.reward)
                state = step(state, a[i])
                np.testing.assert_allclose(answer.obs[i], state.obs, atol=1e-5)
                assert float(answer.reward[i]) == pytest.approx(reward + float(state.reward), abs=1e-5)
        assert not any(answer.terminated.any() or answer.truncated.any() for answer in found)
        assert not torch.equal(first[0], first[1])

    def test_episodes_end_after_500_decisions_and_begin_by_mask_with_their_own_seed(self, simulator: Any) -> None:
        envs, alone = (simulator("CartpoleBalance", "jax", s, CPU) for s in (SEEDS, SEEDS[1:2]))
        envs.reset(torch.ones(3, dtype=torch.bool))
        still = torch.zeros(3, 1)
        for _ in range(100):
            envs.step(still)
        one = torch.tensor([False, True, False])
        second = envs.reset(one)[1]
        alone.reset(torch.ones(1, dtype=torch.bool))
        assert torch.equal(alone.reset(torch.ones(1, dtype=torch.bool))[0], second)
        for i in range(1, 501):
            found = envs.step(still)
            alone_found = alone.step(still[:1])
            assert found.truncated.tolist() == [i >= 400, i == 500, i >= 400]
        torch.testing.assert_close(found.obs[1], alone_found.obs[0], atol=1e-3, rtol=1e-3)
        assert found.obs.isfinite().all()

    @pytest.mark.parametrize("engine", ["jax", "warp"])
    def test_it_goes_on_where_another_stood(self, engine: str, simulator: Any) -> None:
        if engine == "warp":
            pytest.importorskip("warp")
        envs, other = (simulator("CartpoleBalance", engine, s, CPU) for s in (SEEDS, [1, 2, 3]))
        everyone, actions = torch.ones(3, dtype=torch.bool), torch.full((3, 1), 0.3)
        envs.reset(everyone)
        for _ in range(3):
            envs.step(actions)
        kept = {k: x.clone() for k, x in envs.state().items()}
        assert {x.dtype for x in kept.values()} <= {torch.float32, torch.int32, torch.int64, torch.bool}
        other.set_random_state(envs.random_state())
        other.load_state(kept)
        for _ in range(3):
            assert torch.equal(envs.step(actions).obs, other.step(actions).obs)
        assert torch.equal(envs.reset(everyone), other.reset(everyone))
        with pytest.raises(ValueError, match="another state"):
            simulator("CartpoleBalance", engine, SEEDS[:2], CPU).load_state(kept)

    def test_engines_agree(self, simulator: Any) -> None:
        pytest.importorskip("warp")
        both = [simulator("CartpoleBalance", engine, SEEDS, CPU) for engine in ("jax", "warp")]
        one, other = (envs.reset(torch.ones(3, dtype=torch.bool)) for envs in both)
        torch.testing.assert_close(one, other)
        for _ in range(10):
            one, other = (envs.step(torch.full((3, 1), 0.5)) for envs in both)
        torch.testing.assert_close(one.obs, other.obs, atol=1e-3, rtol=1e-3)

    def test_no_tensor_is_copied_between_jax_and_torch(self, simulator: Any) -> None:
        from tdmpc2_fast.train.envs.device import mjx

        x = torch.rand(64, 6)
        there = mjx._to_jax(x)
        assert there.unsafe_buffer_pointer() == x.data_ptr()
        assert mjx._to_torch(there).data_ptr() == x.data_ptr()

    def test_physics_that_break_are_told_by_nan_and_healed_by_a_reset(self, simulator: Any) -> None:
        envs = simulator("CartpoleBalance", "jax", SEEDS, CPU)
        envs.reset(torch.ones(3, dtype=torch.bool))
        found = envs.step(torch.tensor([[0.0], [torch.nan], [0.0]]))
        assert found.obs.isfinite().all(1).tolist() == [True, False, True]
        assert found.obs[1].isnan().all()
        assert not found.terminated.any()
        assert envs.reset(torch.tensor([False, True, False]))[1].isfinite().all()
        assert envs.step(torch.zeros(3, 1)).obs.isfinite().all()

    def test_a_run(self, simulator: Any, tmp_path: Path) -> None:
        keys = dict(TINY, task=TASK, num_envs=2, steps=1020, seed_steps=1000, eval_freq=10_000, eval_episodes=1)
        cfg = Config.from_dict(dict(keys, mpc=False, utd=0.5, device="cpu", tensorboard=False))
        trainer = OnlineTrainer(cfg, tmp_path)
        found = trainer.run()
        assert found.lengths == [500]
        assert 0 < found.mean_return <= 1000
        assert trainer.buffer.num_eps == 2
        assert trainer.buffer._table[:2, 1].tolist() == [501, 501]
        assert trainer.agent.updater.steps == 1000 + int(0.5 * (1020 - 1002))
        kept = trainer.buffer.steps(0, 1002)
        assert kept["obs"].isfinite().all()
        assert not torch.equal(kept["obs"][:501], kept["obs"][501:])
        rewards = torch.cat([kept["reward"][1:501], kept["reward"][502:]])
        assert rewards.min() > 0
        assert rewards.max() <= 2

    def test_pictures_change_nothing(self, simulator: Any) -> None:
        env, other = (make_env(Config(task=TASK, device="cpu"), 5) for _ in range(2))
        assert np.array_equal(env.reset(), other.reset())
        try:
            picture = env.render(64, 48)
        except RenderError as e:
            pytest.skip(str(e))
        assert picture.shape == (48, 64, 3)
        assert picture.std() > 1
        action = np.full(1, 0.5, np.float32)
        for _ in range(10):
            assert np.array_equal(env.step(action)[0], other.step(action)[0])
        assert not np.array_equal(env.render(64, 48), picture)
        env.close()
