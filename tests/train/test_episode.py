"""An episode as it is recorded, and as it is played again."""

from __future__ import annotations

import numpy as np
import pytest

from tdmpc2_fast.train.envs.base import Step
from tdmpc2_fast.train.run.episode import Episode

FIRST = np.array([0.0, 0.0, 0.0], np.float32)
ACTIONS = [np.array(a, np.float32) for a in ([0.1, 0.2], [0.3, 0.4], [0.5, 0.6])]
STEPS = [
    Step(FIRST + 1, 2.0, False, False, 0.0),
    Step(FIRST + 2, 0.5, False, False, 1.0),
    Step(FIRST + 3, 4.0, True, False, 0.25),
]


def played(count: int = 3) -> Episode:
    episode = Episode(FIRST, 2)
    for action, step in zip(ACTIONS[:count], STEPS[:count], strict=True):
        episode.append(action, step)
    return episode


def test_an_episode_holds_what_came_of_each_decision() -> None:
    begun, middle, over = played(0), played(2), played()
    assert [len(e) for e in (begun, middle, over)] == [0, 2, 3]
    assert [e.ended for e in (begun, middle, over)] == [False, False, True]
    assert [e.success for e in (begun, middle, over)] == [0.0, 1.0, 0.25]
    assert [e.total for e in (begun, middle, over)] == [0.0, 2.5, 6.5]
    np.testing.assert_array_equal(over.actions, np.stack(ACTIONS))
    truncated = played(1)
    truncated.append(ACTIONS[1], STEPS[1]._replace(truncated=True))
    assert truncated.ended
    rows = over.rows()
    np.testing.assert_array_equal(rows["obs"][:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(rows["action"], [[np.nan] * 2, *np.stack(ACTIONS)])
    np.testing.assert_array_equal(rows["reward"], [np.nan, 2, 0.5, 4])
    np.testing.assert_array_equal(rows["terminated"], [np.nan, 0, 0, 1])
    assert {x.dtype for x in rows.values()} == {np.dtype(np.float32)}


def test_an_episode_is_played_again_only_where_the_same_comes_of_it() -> None:
    kept, start = played().tensors(), Step(FIRST, 0.0, False, False, 0.0)
    again = Episode.replayed(kept, [start, *STEPS])
    assert again is not None
    assert (len(again), again.total, again.ended, again.success) == (3, 6.5, True, 0.25)
    np.testing.assert_array_equal(again.actions, np.stack(ACTIONS))
    tiny = float(np.nextafter(4.0, 5.0))  # the same in float32
    for other in (
        STEPS[2]._replace(obs=FIRST),
        STEPS[2]._replace(reward=tiny),
        STEPS[2]._replace(terminated=False, truncated=True),
        STEPS[2]._replace(success=0.0),
    ):
        assert Episode.replayed(kept, [start, *STEPS[:2], other]) is None
    assert Episode.replayed(kept, [start._replace(obs=FIRST - 1), *STEPS]) is None
    with pytest.raises(ValueError, match="zip"):
        Episode.replayed(kept, [start, *STEPS[:2]])
