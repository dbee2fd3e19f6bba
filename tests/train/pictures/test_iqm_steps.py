"""The steps at which the IQM of long runs is taken."""

from __future__ import annotations

import numpy as np
import pytest

from tdmpc2_fast.train.pictures.curves import Curve, iqm_over_tasks

pytest.importorskip("scipy")


@pytest.mark.parametrize("count", [200, 201, 1000])
def test_the_iqm_of_many_steps_is_taken_at_200_from_first_to_last(count: int) -> None:
    steps = 10.0 * np.arange(count)
    band = iqm_over_tasks({"cheetah-run": [Curve("default", "cheetah-run", 1, steps, 2 * steps)]})
    assert len(band.steps) == 200
    assert (band.steps[0], band.steps[-1]) == (0, steps[-1])
    assert {*np.diff(band.steps)} <= {10 * (count // 200), 10 * (count // 200 + 1)}
    assert band.centre == pytest.approx(band.steps / 500)
