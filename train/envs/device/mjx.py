"""Tasks of MuJoCo Playground on MJX: a decision of all environments is one compiled call of JAX.

Tensors go between JAX and torch by DLPack, without a copy. Episode n of an environment is drawn from its seed
and n alone, whatever the others do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from typing_extensions import override

from tdmpc2_fast.errors import ConfigError, InputError

from ..base import RenderError, in_a_line
from ..mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering
from .base import DeviceEnvironments, DeviceStep

prepare_rendering()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else most of a GPU's memory, which torch shares

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from mujoco_playground import dm_control_suite  # noqa: E402

keep_log_out_of_the_way()

_ACTION_REPEAT = 2
_CONTACTS = 100  # of an environment, where the engine has room for those of all together


@dataclass(frozen=True)
class _Task:
    """A task and its functions, compiled once for each number of environments."""

    env: Any
    decisions: int  # an episode
    begin: Callable[[Any, Any], Any]  # seeds and numbers of the episodes (E,) -> state
    merge: Callable[[Any, Any, Any], Any]  # mask (E,), new, old -> state
    decide: Callable[[Any, Any], Any]  # state, actions (E, A) -> state, observations, rewards
    compiled: set[int] = field(default_factory=set)  # for so many environments


@functools.cache
def _task(name: str, impl: str, contacts: int, device: Any) -> _Task:
    with jax.default_device(device):
        config = dm_control_suite.get_default_config(name)
        config.impl = impl
        config.naconmax = max(config.naconmax, contacts)
        env = dm_control_suite.load(name, config=config)
    ranges = env.mj_model.actuator_ctrlrange
    low, high = jnp.asarray(ranges[:, 0]), jnp.asarray(ranges[:, 1])

    def settled(state: Any) -> Any:
        """Return a state in types that do not depend on who made it, else functions of it are compiled twice."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)

    def begin(seed: Any, number: Any) -> Any:
        return settled(env.reset(jax.random.fold_in(jax.random.PRNGKey(seed), number)))

    def merge(mask: Any, new: Any, old: Any) -> Any:
        def one(x: Any, y: Any) -> Any:
            if x.shape[:1] != mask.shape:  # scratch of the engine that is not of one environment
                return y
            return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        return jax.tree.map(one, new, old)

    def decide(state: Any, action: Any) -> Any:
        control = low + (action + 1) * (high - low) / 2

        def step(state: Any, _: Any) -> Any:
            state = settled(env.step(state, control))
            return state, state.reward

        state, rewards = jax.lax.scan(step, state, length=_ACTION_REPEAT)
        # These tasks are done where the physics broke, and then only.
        return state, jnp.where(state.done, jnp.nan, state.obs), rewards.sum()

    return _Task(
        env,
        config.episode_length // _ACTION_REPEAT,
        jax.jit(jax.vmap(begin)),
        jax.jit(merge),
        jax.jit(jax.vmap(decide)),
    )


class Playground(DeviceEnvironments):
    """A task in as many environments as there are seeds.

    Args:
        name: as Playground has it.
        impl: the engine, `jax` or `warp`.
        seeds: one for each environment.
        device: where the tensors are.

    Raises:
        ConfigError: JAX does not know the device, or Playground cannot make the task there with this engine.
    """

    action_repeat = _ACTION_REPEAT

    def __init__(self, name: str, impl: str, seeds: Sequence[int], device: torch.device) -> None:
        self.num_envs, self.device, self._jax_device = len(seeds), device, _device_of(device)
        if impl == "warp":
            import warp

            warp.config.log_level = warp.LOG_WARNING  # else it lists hundreds of kernels
        try:
            self._task = _task(name, impl, _CONTACTS * len(seeds), self._jax_device)
        except Exception as e:  # of Playground, of MuJoCo in a version that it does not know, or of the engine
            raise ConfigError(
                f"config key 'task': playground:{name} cannot be made by {impl} on {device}: {in_a_line(e)}"
            ) from e
        self.max_episode_steps, self.frames_per_second = self._task.decisions, 1 / (_ACTION_REPEAT * self._task.env.dt)
        self.action_dim = int(self._task.env.action_size)
        self._seeds = self._placed(seeds)
        self._episodes = torch.zeros(len(seeds), dtype=torch.int64, device=device)  # begun so far
        self._decisions = torch.zeros_like(self._episodes)  # of the episode
        self._state: Any = None  # before the first reset
        self._form = jax.eval_shape(self._task.begin, self._seeds, self._placed([0] * len(seeds)))
        self.obs_shape: tuple[int, ...] = self._form.obs.shape[1:]
        self._nothing = torch.zeros(len(seeds), device=device)
        self._never = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        self._picture: Any = None

    def compile(self) -> None:
        """Compile for this number of environments, up to a minute: an answer that takes as long counts as none."""
        if self.num_envs in self._task.compiled:
            return
        state = self._task.begin(self._seeds, self._placed([0] * self.num_envs))
        state = self._task.merge(_to_jax(self._never), state, state)
        jax.block_until_ready(
            self._task.decide(state, _to_jax(self._nothing.new_zeros(self.num_envs, self.action_dim)))
        )
        self._task.compiled.add(self.num_envs)

    def _placed(self, values: Sequence[int]) -> Any:
        return jax.device_put(np.asarray(values, np.uint32), self._jax_device)

    @override
    def reset(self, mask: Tensor) -> Tensor:
        new = self._task.begin(self._seeds, _to_jax(self._episodes.int()).astype(jnp.uint32))
        self._state = new if self._state is None else self._task.merge(_to_jax(mask), new, self._state)
        self._episodes = self._episodes + mask
        self._decisions = self._decisions.masked_fill(mask, 0)
        return _to_torch(new.obs)

    @override
    def step(self, actions: Tensor) -> DeviceStep:
        self._state, obs, reward = self._task.decide(self._state, _to_jax(actions))
        self._decisions = self._decisions + 1
        over = self._decisions >= self.max_episode_steps
        return DeviceStep(_to_torch(obs), _to_torch(reward), self._never, over, self._nothing)

    @override
    def random_state(self) -> dict[str, list[int]]:
        return dict(seeds=np.asarray(self._seeds).tolist(), episodes=self._episodes.tolist())

    @override
    def set_random_state(self, state: dict[str, list[int]]) -> None:
        self._seeds = self._placed(state["seeds"])
        self._episodes = torch.tensor(state["episodes"], device=self.device)

    @override
    def state(self) -> Mapping[str, Tensor]:
        if self._state is None:
            return {}
        parts = {f"part {i}": _to_torch(_signed(x)) for i, x in enumerate(jax.tree.leaves(self._state))}
        return parts | dict(decisions=self._decisions)

    @override
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        form, tree = jax.tree.flatten(self._form)
        parts = [state[f"part {i}"] for i in range(len(state) - 1)]
        shapes = [[tuple(x.shape) for x in of] for of in (parts, form)]
        if shapes[0] != shapes[1]:
            raise ValueError("the physics has another state than in the version that wrote the checkpoint")
        self._state = jax.tree.unflatten(
            tree, [_unsigned(_to_jax(x.to(self.device)), y.dtype) for x, y in zip(parts, form, strict=True)]
        )
        self._decisions = state["decisions"].to(self.device)

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        """Draw the first environment, as `Env.render`."""
        import mujoco

        if self._state is None:
            raise RenderError("mujoco_playground: no picture before the first reset")
        model, data = self._task.env.mj_model, self._state.data
        try:
            if self._picture is None or (self._picture.width, self._picture.height) != (width, height):
                self._close_picture()
                self._picture = mujoco.Renderer(model, height, width)
        except ValueError as e:  # larger than the model's own buffer
            raise InputError(f"width, height: got {width}, {height}: {e}") from e
        except Exception as e:  # whatever the OpenGL driver at hand raises
            raise cannot_render("mujoco_playground", e) from e
        here = mujoco.MjData(model)
        for part in ("qpos", "qvel", "mocap_pos", "mocap_quat"):
            getattr(here, part)[:] = np.asarray(getattr(data, part)[0])
        mujoco.mj_forward(model, here)
        self._picture.update_scene(here, camera=0 if model.ncam else -1)
        picture: NDArray[np.uint8] = self._picture.render()
        return picture

    def _close_picture(self) -> None:
        if self._picture is not None:
            self._picture.close()
            self._picture = None

    @override
    def close(self) -> None:
        self._close_picture()
        self._state = None


def _device_of(device: torch.device) -> Any:
    """Return JAX's own name of a device."""
    try:
        return jax.devices("gpu" if device.type == "cuda" else device.type)[device.index or 0]
    except RuntimeError as e:
        here = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ConfigError(
            f"config key 'device': got {device}, allowed: {here}, which JAX knows here; pip install 'jax[cuda12]' adds "
            "a GPU of NVIDIA"
        ) from e


def _to_torch(x: Any) -> Tensor:
    found: Tensor = from_dlpack(x)
    return found


def _to_jax(x: Tensor) -> Any:
    return jax.dlpack.from_dlpack(x.contiguous())


def _signed(x: Any) -> Any:
    """Return unsigned integers, such as random keys, as files hold them."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.uint32 else x


def _unsigned(x: Any, dtype: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.uint32 else x
