"""The table of what machine code costs: what is worse is said, and the page shows what the table has."""

from __future__ import annotations

import pytest

from tdmpc2_fast.benchmarks import static

WORK = static.Work(90, 5, 1, 6, "bfloat16")
ROW = static.Row(WORK, 109, 166.4, 941.5, 31.6, 128, {"grouped_layer": (86, 143.0)}, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(), []),
        (dict(slots_us=166.4 * 1.02, launches=100, l2_mb=1.0), []),
        (dict(slots_us=180.0), ["slots_us 180.0, in the table 166.4"]),
        (dict(l2_mb=1000.0), ["l2_mb 1000.0, in the table 941.5"]),
        (dict(launches=110), ["launches 110, in the table 109"]),
        (dict(faults=["grouped_layer: spills 8 bytes a thread"]), ["grouped_layer: spills 8 bytes a thread"]),
        (dict(work=WORK._replace(size=7)), ["not in the table, write it anew"]),
    ],
)
def test_what_is_worse_is_said(changes: dict[str, object], said: list[str]) -> None:
    found = static.compare([ROW._replace(**changes)], [ROW])  # type: ignore[arg-type]
    assert [line.split(": ", 1)[1] for line in found] == said


def test_every_work_is_in_every_table_and_on_the_page() -> None:
    page = static.PAGE.read_text()
    for file in static.tables():
        table = static.read(file)
        assert {row.work for row in table} >= set(static.works(everything=False))
        assert not [row for row in table if row.faults]
    assert static.with_tables(page, table) == page


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^page: got 0 places for the table of plans"):
        static.with_tables("", [ROW])


def test_words_it_does_not_know_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert static.main(["everything"]) == 2
    assert "got 'everything', allowed: write, all, jobs=N" in capsys.readouterr().err
