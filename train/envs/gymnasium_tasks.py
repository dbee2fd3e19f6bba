"""Gymnasium tasks: the official short names, and any id whose spaces can be used.

One decision is one environment step. Actions are rescaled from [-1, 1] to the space's
bounds (for the official tasks these are the same). Tasks that can terminate need
`episodic=true`. Settings (`env.KEY=VALUE`) are keyword arguments of `gymnasium.make`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
import types
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tdmpc2_fast.config import Config
from tdmpc2_fast.errors import ConfigError, did_you_mean

from . import random_state
from .answers import EnvError, NotHereError, unusable
from .base import FAILURES, Array, Env, RenderError, in_a_line
from .catalogue import lacks, with_continuous_actions
from .mujoco_setup import cannot_render, keep_log_out_of_the_way, prepare_rendering
from .spaces import ObservationSpace, action_space, facts

# Official name: Gymnasium id, decisions per episode, keyword arguments
OFFICIAL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mujoco-walker": ("Walker2d-v5", 1000, {}),
    "mujoco-halfcheetah": ("HalfCheetah-v5", 1000, {}),
    "bipedal-walker": ("BipedalWalker-v3", 1600, {}),
    "lunarlander-continuous": ("LunarLander-v3", 500, {"continuous": True}),
}
_SUCCESS_RETURN = {"lunarlander-continuous": 200.0}
_OURS = {
    "id": "task=ID",
    "max_episode_steps": "episode_length=N",
    "disable_env_checker": "nothing: what an environment answers is always checked",
}
"""Arguments of `gymnasium.make` that are no settings of the environment, and what is given instead."""
# Of Gymnasium-Robotics, whose ids are there once it has been imported.
_OF_ROBOTICS = re.compile(
    r"(Fetch(Reach|Push|Slide|PickAndPlace)|Hand(Reach|Manipulate)|AdroitHand|(Ant|Point)Maze_|FrankaKitchen)\w*-v\d+"
)
_OFFICIAL_OVERRIDES = dict(discount_max=0.99, rho=0.7)


def names() -> tuple[str, ...]:
    """List the official names and, where gymnasium is installed, its tasks with continuous actions."""
    return (*OFFICIAL, *with_continuous_actions(_registered()))


def _registered() -> Mapping[str, Any]:
    try:
        import gymnasium
    except ImportError:
        return {}
    registry: Mapping[str, Any] = gymnasium.registry
    return registry


def accepts(name: str) -> bool:
    """Tell whether a name is an official one, a registered id, or looks like an id (Name-v0, module:Name)."""
    return name in OFFICIAL or name in _registered() or _looks_like_id(name)


def _looks_like_id(name: str) -> bool:
    stem, dash, version = name.rpartition("-v")
    return bool(stem and dash and version.isdigit()) or all(name.partition(":"))


class GymnasiumTask(Env):
    """A Gymnasium environment with the project's conventions.

    Args:
        env: the environment, wrapped as it may be.
        cfg: `task` and `obs` are read.
        seed: of the first episode; the others follow from it.
        steps: decisions per episode, after which it truncates.
        name: of the environment, for messages; default `cfg.task`.

    Raises:
        ConfigError: its spaces cannot be used, or nobody says how long its episodes are.
    """

    action_repeat = 1

    def __init__(self, env: Any, cfg: Config, seed: int | None, steps: int | None, name: str = "") -> None:
        name = name or cfg.task
        self.env = env
        self._actions = action_space(_told(self.env, "action_space"), cfg.task)
        self._observations = ObservationSpace(_told(self.env, "observation_space"), cfg.obs, cfg.task)
        if not steps:
            raise ConfigError(f"config key 'episode_length': {name!r} has no time limit; set decisions per episode")
        self.task, self.name = cfg.task, name
        self.max_episode_steps = int(steps)
        self.obs_shape, self.action_dim = self._observations.shape, self._actions.size
        self.frames = self._observations.frames
        self.frames_per_second = _frames_per_second(self.env)
        self._seed: int | None = seed
        self._return = 0.0

    @property
    def notes(self) -> list[str]:
        """What a person should know of how it is trained, one line for each fact."""
        return facts(self.name, self._actions, self._observations)

    def seen(self, obs: Any, first: bool) -> NDArray[Any]:
        """Return an observation of the environment as models take it; `first`: it begins an episode."""
        return self._observations(obs, first)

    def done(self, action: NDArray[np.float32]) -> Any:
        """Return the environment's action for one of (A,) in [-1, 1]."""
        return self._actions(action)

    @override
    def reset(self) -> Array:
        try:
            answer = self.env.reset(seed=self._seed)
        except TypeError as e:
            if "unexpected keyword argument" not in str(e):
                raise
            raise EnvError(f"reset: {e}, allowed: reset(self, *, seed=None, options=None)") from e
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise unusable("reset", answer, "an observation and an info")
        self._seed, self._return = None, 0.0
        return self._observations(answer[0], first=True)

    @override
    def step(self, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        try:
            obs, reward, terminated, truncated, info = self.env.step(self._actions(action))
        except ValueError as e:
            if "values to unpack (expected 5" not in str(e):
                raise
            allowed = "observation, reward, terminated, truncated, info"  # which wrappers of Gymnasium count on, too
            raise EnvError(f"step: {e}, allowed: {allowed}") from e
        target = _SUCCESS_RETURN.get(self.task)
        if target is not None:
            self._return += float(reward)
            info = {"success": float(self._return > target)}
        return self._observations(obs, first=False), reward, terminated, truncated, info

    @override
    def render(self, width: int = 384, height: int = 384) -> NDArray[np.uint8]:
        """Draw with the environment's own renderer, whose picture is fitted into this shape."""
        from ..pictures.frames import fitted, rgb  # which take packages of the extra [train]

        if self.env.render_mode != "rgb_array":
            modes = _metadata(self.env).get("render_modes")
            raise RenderError(f"{self.name}: no pictures: its render modes are {modes}, not 'rgb_array'")
        mujoco = next(filter(None, (_told(env, "mujoco_renderer") for env in self._inner())), None)
        if mujoco is not None and mujoco.viewer is None:
            prepare_rendering()
            mujoco.width, mujoco.height = width, height  # of the first picture, and then for good
            buffer = mujoco.model.vis.global_
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
        elif mujoco is not None:
            mujoco.viewer.make_context_current()  # another environment's may be
        try:
            return fitted(rgb(self.env.render()), width, height)
        except Exception as e:  # of OpenGL, or of a package that is missing
            raise cannot_render(self.name, e) if mujoco else RenderError(f"{self.name}: no pictures: {e}") from e

    @override
    def overrides(self, cfg: Config) -> Config:
        return cfg.replace(**_OFFICIAL_OVERRIDES) if self.task in OFFICIAL else cfg

    @override
    def random_state(self) -> dict[str, Any] | None:
        """Return the seed of the first episode, then the generators' states; None where one is of an unknown kind."""
        states = [random_state.told(_told(env, "np_random")) for env in self._inner()]
        if None in states:
            return None
        state = {"seed": self._seed, "generator": states[0]}
        return {**state, "within": states[1:]} if states[1:] else state

    @override
    def set_random_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if state["seed"] is None:
            if self._seed is not None:  # an environment may make its generators when it is first reset
                self.env.reset(seed=self._seed)
            for env, own in zip(self._inner(), [state["generator"], *state.get("within", [])], strict=True):
                random_state.take(_told(env, "np_random"), own)
        self._seed = state["seed"]

    def _inner(self) -> list[Any]:
        """Return the environment without wrappers, then those that are parts of it: a maze's ant, a kitchen's robot."""
        import gymnasium

        base = self.env.unwrapped
        return [base, *(x.unwrapped for x in getattr(base, "__dict__", {}).values() if isinstance(x, gymnasium.Env))]

    @override
    def close(self) -> None:
        self.env.close()


def make(cfg: Config, seed: int) -> Env:
    """Make the environment of an official name or a Gymnasium id."""
    keep_log_out_of_the_way()
    name, length, kwargs = OFFICIAL.get(cfg.task, (cfg.task, 0, {}))
    limit = length or cfg.episode_length
    env = _made(cfg.task, name, {**kwargs, **(cfg.env_kwargs or {})}, limit)
    return GymnasiumTask(env, cfg, seed, limit or (env.spec and env.spec.max_episode_steps), name)


def _made(task: str, name: str, settings: dict[str, Any], limit: int | None) -> Any:
    """Return what `gymnasium.make` makes of a name and settings; `limit`: decisions, where another is asked for."""
    import gymnasium

    module, _, registered = name.rpartition(":")
    if module:  # of which the import registers the id
        _import(module, name)
    _register_robotics(registered)
    spec = gymnasium.envs.registration.registry.get(registered)
    for key, instead in _OURS.items():
        if key in settings:
            raise ConfigError(f"config key 'env.{key}': got {settings[key]!r}, allowed: {instead}")
    # Our own checks say more than the passive checker's.
    tries = [dict(settings, max_episode_steps=limit, disable_env_checker=True)]
    if "render_mode" not in settings and _draws(spec):
        tries.append({**tries[0], "render_mode": "rgb_array"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            try:
                return gymnasium.make(registered, **copy.deepcopy(tries.pop()))  # a constructor may change them
            except FAILURES as e:
                if not tries:  # else it may be made without pictures
                    raise _cannot_make(task, name, settings, e) from e


def _import(module: str, name: str) -> None:
    """Import a module, from the working directory if it is nowhere else."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all others, so that it hides none
    try:
        importlib.import_module(module)
    except FAILURES as e:
        text = str(e) if isinstance(e, ImportError) else in_a_line(e)
        why = f"the module {module!r} of {name!r} cannot be imported: {text}"
        if isinstance(e, ImportError) and e.name is not None and f"{module}.".startswith(f"{e.name}."):
            why = f"{name!r} needs {module}, a module that is neither installed nor in {os.getcwd()!r}"
        raise ConfigError(f"config key 'task': {why}") from e


def _register_robotics(name: str) -> None:
    """Register the ids of Gymnasium-Robotics, if `name` looks like one of them.

    Raises:
        ConfigError: the package is not installed.
    """
    if not _OF_ROBOTICS.fullmatch(name):
        return
    try:
        import gymnasium_robotics  # noqa: F401 - which registers them
        from gymnasium_robotics.utils import mujoco_utils
    except ImportError as e:
        raise NotHereError(
            f"config key 'task': {name!r} needs {e.name or e}; pip install 'tdmpc2-fast[robotics]'"
        ) from e
    _let_joint_types_be_found(mujoco_utils)


def _let_joint_types_be_found(module: Any) -> None:
    """Let this module see MuJoCo's kinds of joints as numbers.

    It looks for numpy's numbers in tuples of them, which newer releases of MuJoCo (3.12, not 3.8)
    call unequal, and fails to make the arms and hands.
    """
    kinds = module.mujoco.mjtJoint
    if np.int32(kinds.mjJNT_HINGE) in (kinds.mjJNT_HINGE,):
        return
    seen = types.ModuleType("mujoco")
    seen.__dict__.update(vars(module.mujoco))
    seen.mjtJoint = types.SimpleNamespace(**{k: int(v) for k, v in kinds.__members__.items()})  # type: ignore[attr-defined]
    module.mujoco = seen


def _cannot_make(task: str, name: str, settings: dict[str, Any], e: BaseException) -> ConfigError:
    import gymnasium

    module, _, registered = name.rpartition(":")
    text = " ".join(str(e).split()).rstrip(".")
    if isinstance(e, gymnasium.error.DependencyNotInstalled) and (package := lacks(task)):
        return NotHereError(f"config key 'task': {task!r} {package}")
    if isinstance(e, gymnasium.error.Error) and not isinstance(e, gymnasium.error.DependencyNotInstalled):
        text = text.partition(" Did you mean")[0].rstrip(".")  # which names no whole id
        if module:
            text += f" ({module} is {getattr(sys.modules[module], '__file__', None)})"
        hint = did_you_mean(registered, _registered())
        return ConfigError(f"config key 'task': Gymnasium cannot make {task!r}: {text}.{hint}")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown and unknown[1] in settings:
        return ConfigError(f"config key 'env.{unknown[1]}': {task!r} has no such setting: {text}")
    kind = "" if isinstance(e, gymnasium.error.Error) else f"{type(e).__name__}: "
    return ConfigError(f"config key 'task': {task!r} cannot be made: {kind}{text}")


def _draws(spec: Any) -> bool:
    """Tell whether an environment has pictures and its constructor takes `render_mode`.

    MuJoCo's, Box2D's and Gymnasium's own draw only when asked to.
    """
    from gymnasium.envs.registration import load_env_creator

    if spec is None or spec.entry_point is None:
        return False
    try:
        entry = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        takes = inspect.signature(entry).parameters.values()
    except Exception:  # making it says what is wrong
        return False
    named = any(p.name == "render_mode" for p in takes)
    modes = _metadata(entry).get("render_modes")
    if not modes:  # of a function: what it makes is not known before
        return named and modes is None
    return "rgb_array" in modes and (named or any(p.kind is p.VAR_KEYWORD for p in takes))


def _frames_per_second(env: Any) -> float:
    """Return decisions per second of simulated time, by the time step it tells; else its `render_fps`; else 30."""
    wanted = _metadata(env).get("render_fps")
    for value, turned in ((_told(env.unwrapped, "dt"), True), (wanted, False)):
        if isinstance(value, (int, float, np.number)) and 1e-6 < value < 1e6:
            return 1 / float(value) if turned else float(value)
    return 30.0


def _told(of: Any, name: str) -> Any:
    """Return an attribute; None where there is none, or a property of somebody's raises."""
    try:
        return getattr(of, name, None)
    except Exception:
        return None


def _metadata(of: Any) -> dict[str, Any]:
    found = getattr(of, "metadata", None)
    return found if isinstance(found, dict) else {}
