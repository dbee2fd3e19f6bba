"""Spaces of other people: actions are exact and contained, observations become numbers or images, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_runs import (
    begun,
    made,
    refused,
    train_here,  # noqa: F401
)

from tdmpc2_fast.errors import InputError
from tdmpc2_fast.train.envs import base as envs_base
from tdmpc2_fast.train.envs.gymnasium_tasks import GymnasiumTask

gymnasium = pytest.importorskip("gymnasium")
import foreign_envs  # noqa: E402


@pytest.mark.parametrize("name", foreign_envs.ACTIONS)
def test_actions_are_exact_and_contained(name: str) -> None:
    env = begun(name)
    space = env.env.action_space
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    middle = np.rint((low + high) / 2) if space.dtype.kind in "biu" else ((low + high) / 2)
    for value, expected in ((-1, low), (1, high), (0, middle)):
        env.step(np.full(env.action_dim, value, np.float32))
        np.testing.assert_array_equal(foreign_envs.Plain.seen[-1], expected.astype(space.dtype))
    for action in np.random.default_rng().uniform(-1.001, 1.001, (100, env.action_dim)).astype(np.float32):
        env.step(action)  # which asserts that it is contained


def test_a_space_of_the_official_bounds_changes_no_action() -> None:
    env = begun("Plain")
    for action in np.random.default_rng().uniform(-1, 1, (50, 1)).astype(np.float32):
        env.step(action)
        assert foreign_envs.Plain.seen[-1].tobytes() == action.tobytes()


@pytest.mark.parametrize("name", ["Integers", "PartlyFixed", "Grid", "Discrete"])
def test_strange_action_spaces_are_trained(name: str, train: Any) -> None:
    status, said = train(name)
    assert status == 0
    assert ("low and high of these actions are equal, so they stay there: [1]" in said) == (name == "PartlyFixed")
    assert ("discrete actions are relaxed: 3 numbers, the largest of which is chosen" in said) == (name == "Discrete")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ActionsInParts", "allowed: a Box with finite bounds, Discrete, MultiDiscrete or MultiBinary"),
        ("Unbounded", "allowed: finite bounds"),
        ("HalfBounded", "allowed: finite bounds"),
        ("Overflowing", "float32"),
        ("Countless", "2**53"),
        ("AllFixed", "fixed"),
        ("Empty", "at least one dimension"),
    ],
)
def test_actions_that_cannot_be_scaled_are_refused_at_the_start(name: str, words: str) -> None:
    said = refused(name)
    assert words in said
    assert f"'foreign_envs:Foreign{name}-v0' has the action space" in said


# ---- observations


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Picture", (9, 64, 64)),
        ("ChannelsFirst", (9, 64, 64)),
        ("Stacked", (4, 64, 64)),
        ("StackedColours", (6, 64, 64)),
        ("WithAlpha", (4, 64, 64)),
        ("SixteenFrames", (16, 64, 64)),
        ("Grey", (3, 64, 64)),
        ("Shares", (9, 64, 64)),
        ("OnePart", (9, 64, 64)),
    ],
)
def test_images_become_stacks_of_64x64(name: str, shape: tuple[int, ...]) -> None:
    env = made(name, obs="rgb")
    obs = envs_base.reset(env)
    assert (env.obs_shape, obs.shape, obs.dtype) == (shape, shape, np.uint8)
    first = 51 if name == "Shares" else 40
    assert (obs == first).all()
    found = envs_base.step(env, np.zeros(1, np.float32)).obs
    newest = shape[0] // 3 if name not in ("Stacked", "StackedColours", "WithAlpha", "SixteenFrames") else shape[0]
    assert (found[-newest:] == first + (name != "Shares")).all()
    assert (found[:-newest] == first).all()
    assert "set obs=rgb" in refused(name)


def test_an_image_keeps_its_place_in_whatever_order_its_axes_are() -> None:
    rng = np.random.default_rng()
    image = rng.integers(0, 256, (3, 64, 64), np.uint8)
    seen = []
    for name, given in (("Picture", image.transpose(1, 2, 0)), ("ChannelsFirst", image.repeat(2, 2).repeat(2, 1))):
        env = made(name, obs="rgb")
        if name == "ChannelsFirst":
            box = gymnasium.spaces.Box(0, 255, (3, 128, 128), np.uint8)
            env = make_env_with(box)
        env.env.unwrapped.observe = lambda given=given: given
        seen.append(env.reset()[-3:])
    assert np.array_equal(seen[0], image)
    assert np.array_equal(seen[1], image)  # the mean of four equal pixels


def make_env_with(box: Any) -> GymnasiumTask:
    kind = type("Sized", (foreign_envs.Picture,), {"observation_space": box})
    gymnasium.register("ForeignSized-v0", entry_point=kind, max_episode_steps=20)
    return made("Sized", obs="rgb")


def test_images_are_trained_from_pixels(train: Any) -> None:
    status, _ = train("ChannelsFirst", obs="rgb", num_channels=1, latent_dim=16, steps=60, seed_steps=40)
    assert status == 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("CameraAndNumbers", {}, "its part 'camera' is an image beside its part 'speed'"),
        ("CameraAndNumbers", dict(obs="rgb", latent_dim=512), "FilterObservation"),
        ("Plain", dict(obs="rgb", latent_dim=512), "got 'rgb', allowed: obs=state, or images"),
        ("ManyChannels", dict(obs="rgb", latent_dim=512), "got 'rgb', allowed: obs=state, or images"),
        ("WordsInParts", {}, "its part 'inner/log' (Sequence"),
    ],
)
def test_observations_that_cannot_be_used_are_refused_by_part(name: str, changes: Any, words: str) -> None:
    said = refused(name, **changes)
    assert words in said
    assert "has the observation space" in said


def test_a_box_of_several_dimensions_is_told_to_be_flattened() -> None:
    assert made("Plain").notes == []
    (note,) = made("Table").notes
    assert note.endswith(": observations (3, 2) are flattened to 6 numbers")


def test_parts_are_flattened_in_gymnasiums_order() -> None:
    env = made("Parts")
    space = env.env.observation_space
    value = {"place": np.array([[1, 2], [3, 4]], np.float32), "mode": 6, "more": (np.array([0, 1]), np.array([1, 2]))}
    expected = gymnasium.spaces.flatten(space, value)
    np.testing.assert_array_equal(env.reset(), expected.astype(np.float32))


def test_a_replay_that_does_not_fit_is_refused_before_the_run_and_the_advice_works(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdmpc2_fast.learn import ring

    monkeypatch.setattr(ring, "_host_memory", lambda: 2**20)
    with pytest.raises(InputError) as e:
        train("Plain", steps=100_000, buffer_size=90_000)
    assert not (tmp_path / "run").exists()
    fits = int(str(e.value).rpartition("smaller, ")[2].split()[0])
    assert 1_000 < fits < 90_000
    status, _ = train("Plain", steps=80, buffer_size=fits)
    assert status == 0
