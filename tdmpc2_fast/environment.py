"""What a config needs to know of an environment, read off an environment of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .errors import ConfigError, kind_of

_ALLOWED = (
    "an environment with obs_shape, action_dim and max_episode_steps, or Gymnasium's with observation_space, "
    "action_space and spec.max_episode_steps"
)


def sizes_of(env: Any, obs: str, episode_length: int | None) -> tuple[Mapping[str, Any], Any, Any]:
    """Return the shape of the observations of kind `obs`, the width of the action, and the decisions per episode.

    episode_length: taken where the environment tells none.

    Raises:
        ConfigError: the environment does not tell; the message says what is missing.
    """
    shape = getattr(env, "obs_shape", None)
    if shape is None:
        shape = _shape_of(env, "observation_space", obs)
    action_dim = getattr(env, "action_dim", None)
    if action_dim is None:
        (action_dim,) = _shape_of(env, "action_space", obs)
    length = length_of(env) or episode_length
    if length is None:
        raise ConfigError(
            f"env: {kind_of(env)} tells no length of its episodes (spec.max_episode_steps is None); allowed: "
            "gymnasium.make(ID, max_episode_steps=N), or Config(episode_length=N)"
        )
    return shape if isinstance(shape, Mapping) else {obs: shape}, action_dim, length


def length_of(env: Any) -> Any:
    """Return the decisions per episode of an environment, or of those in it; None where it does not tell."""
    for holder, name in ((getattr(env, "spec", None), ""), (env, ""), (env, "_")):
        if length := getattr(holder, f"{name}max_episode_steps", None):
            return length
    for inner in (getattr(env, "env", None), *(getattr(env, "envs", None) or ())):
        if inner is not None:
            return length_of(inner)
    if not hasattr(env, "get_attr"):
        return None
    # In processes of their own, which end where they are asked for what they do not have.
    timed = hasattr(env, "call") and all(env.call("has_wrapper_attr", "_max_episode_steps"))
    return length_of(SimpleNamespace(**{k: env.get_attr(k)[0] for k in ("spec", *["_max_episode_steps"] * timed)}))


def _shape_of(env: Any, name: str, obs: str) -> tuple[int, ...]:
    """Return the shape of a space of one environment; of observations in a dict, that of `obs`."""
    space = getattr(env, f"single_{name}", None)
    space = getattr(env, name, None) if space is None else space
    if space is None:
        raise ConfigError(f"env: got {kind_of(env)} without {name}, allowed: {_ALLOWED}")
    parts = getattr(space, "spaces", None)
    if name == "observation_space" and isinstance(parts, Mapping) and obs in parts:
        space = parts[obs]
    shape = tuple(getattr(space, "shape", None) or ())
    if not shape or not hasattr(space, "low") or (name == "action_space" and len(shape) > 1):
        allowed = "a Box of one dimension" if name == "action_space" else f"a Box, or a Dict with {obs!r} in it"
        raise ConfigError(f"env: {kind_of(env)} has {name}={space}, allowed: {allowed}")
    return shape
