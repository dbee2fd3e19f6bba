"""What the time line of a GPU says: kernels that start early and wait are not counted twice."""

from __future__ import annotations

import pytest

from tdmpc2_fast.benchmarks.gpu import timeline


def test_shares_add_up_to_the_time_from_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_PROFILED", 2)
    one = [
        dict(name="a", grid="8x1x1", start=0.0, end=4.0),
        dict(name="b", grid="8x1x1", start=1.0, end=7.0),  # started early
        dict(name="a", grid="2x1x1", start=8.0, end=9.0),
        dict(name="c", grid="1x1x1", start=8.5, end=8.7),  # hidden by the one before
    ]
    two = [k | dict(start=k["start"] + 10, end=k["end"] + 10) for k in one]
    found = {(name, grid): rest for name, grid, *rest in timeline.shares([*one, *two])}
    assert found["a", "8x1x1"] == [1.0, (4 + 5) / 2, 4.5]
    assert found["b", "8x1x1"] == [1.0, 3.0, 3.0]
    assert found["c", "1x1x1"] == [1.0, 0.0, 0.0]
    assert sum(us for _, us, _ in found.values()) * 2 == 19.0
