"""Rows as tables: for a terminal, for `RESULTS.md`, and for the README.

    python -m tdmpc2_fast.benchmarks.report [RESULTS_FOLDER]

makes `RESULTS.md` beside the results folder, the pictures in the folder, and the README's table anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .harness.measure import COLUMNS, SCHEMA, Row

_PREAMBLE = """# Results

Made by `make results` from the files in `results/`; not edited by hand.

- Times are of one execution, in milliseconds: median, then 20th, 80th and 99th percentile.
- *Ratio*: the time of the line's variant by the product's (N x: what plans for one environment, called for each), a
  ratio of medians with the 20th and 80th percentile of the rounds' own ratios. It is shown only where both gave the
  same result in that run.
- TFLOP/s and GB/s are the work and the bytes that are needed, by the time taken; *of ceiling* is the larger share of
  what the machine reached in the same run with a large matrix product or a copy.
"""
_MARKS = ("<!-- benchmark table: made by `make results` -->", "<!-- end of benchmark table -->")


def read(path: Path) -> list[Row]:
    """Read the rows of a results file.

    Raises:
        ValueError: no results file, or one of another schema.
    """
    try:
        found = json.loads(path.read_text())
        versions = {x["schema"] for x in found}
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ValueError(
            f"{path}: got no results file ({type(e).__name__}), allowed: what `tdmpc2-fast bench` writes"
        ) from e
    if versions - {SCHEMA}:
        raise ValueError(f"{path}: got schema {sorted(versions)}, allowed: {SCHEMA}; measure again")
    rows = []
    for x in found:
        if x.keys() != set(COLUMNS):
            raise ValueError(f"{path}: got columns {sorted(x.keys() ^ set(COLUMNS))} too many or too few")
        rows.append(Row(**x))
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, one a line, in one step: a reader never sees half a file."""
    text = ",\n".join(json.dumps({k: getattr(r, k) for k in COLUMNS}) for r in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f"[\n{text}\n]\n")
    partial.replace(path)


def what(row: Row) -> str:
    """Return what was measured, in words: the plan of a size, for so many environments."""
    parts = [row.case]
    if row.size is not None:
        parts.append(f"{row.size}M")
    if row.envs not in (None, 1):
        parts.append(f"E={row.envs}")
    if row.batch is not None:
        parts.append(f"batch {row.batch}")
    if row.actions not in (None, 6):
        parts.append(f"A={row.actions}")
    if row.precision != "float32" or row.gpu:
        parts.append(row.precision)
    return ", ".join(parts)


def _g(x: float | None, digits: int = 2) -> str:
    """Return a number with some digits; powers of ten only where it is unreadable without."""
    if x is None:
        return ""
    if x != 0 and not 1e-3 <= abs(x) < 1e7:
        return f"{x:.{digits - 1}e}"
    return f"{float(f'{x:.{digits}g}'):,.10g}"


def splits(rows: Sequence[Row]) -> list[str]:
    """Return where the time of a decision goes: a line for each row that knows."""
    lines = []
    for row in rows:
        if row.split:
            whole = sum(v for k, v in row.split.items() if k != "idle")
            parts = ", ".join(f"{k} {_g(v, 3)} ms ({100 * v / whole:.0f}%)" for k, v in row.split.items())
            lines.append(f"{what(row)} by {row.variant}, part by part: {parts}")
    return lines


def _median(row: Row) -> str:
    return f"{row.calls} x {_g(row.p50, 3)}" if row.calls > 1 else _g(row.p50, 3)


def _ratio(row: Row) -> str:
    if row.ratio is not None:
        return f"{row.ratio:.2f}x ({_g(row.ratio_p20, 3)}, {_g(row.ratio_p80, 3)})"
    return row.gate and f"not shown: results differ by {_g(row.gate_error)}, allowed {_g(row.gate_limit)}"


def _share(row: Row) -> str:
    shares = [(x, of) for x, of in ((row.compute_share, "compute"), (row.memory_share, "memory")) if x is not None]
    share, of = max(shares, key=lambda s: s[0], default=(None, ""))
    return "" if share is None else f"{100 * share:.0f}% {of}"


_CELLS: dict[str, Callable[[Row], str]] = {
    "what": what,
    "by": lambda row: row.variant,
    "p50 ms": _median,
    "p20, p80, p99": lambda row: ", ".join(_g(x, 3) for x in (row.p20, row.p80, row.p99)),
    "ratio": _ratio,
    "per second": lambda row: "" if row.per_second is None else f"{_g(row.per_second, 3)} {row.unit}",
    "TFLOP/s": lambda row: _g(row.tflops, 3),
    "GB/s": lambda row: _g(row.gbs, 3),
    "of ceiling": _share,
    "launches": lambda row: "" if row.launches is None else str(row.launches),
    "peak MB": lambda row: _g(row.peak_mb, 4),
}
"""The columns of a table, and what each says of a row."""
HEAD = tuple(_CELLS)


def cells(row: Row) -> dict[str, str]:
    """Return one line of a table, by column."""
    if row.p50 is None:
        missing = {"what": what(row), "by": row.variant, "p50 ms": "-", "p20, p80, p99": f"not measured: {row.missing}"}
        return dict.fromkeys(HEAD, "") | missing
    return {column: of(row) for column, of in _CELLS.items()}


def _table(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """Return the heading and a line for each row; empty columns are left out."""
    lines = [dict(zip(HEAD, HEAD, strict=True)), *map(cells, rows)]
    used = [c for c in columns if c in HEAD[:2] or any(line[c] for line in lines[1:])]
    return [[line[c] for c in used] for line in lines]


def text_table(rows: Sequence[Row]) -> str:
    """Return a table for a terminal."""
    lines = _table(rows, HEAD)
    # What is missing is said in a column that others use for numbers: it may run over.
    plain = [line for line, row in zip(lines, [None, *rows], strict=True) if row is None or row.p50 is not None]
    widths = [max(len(line[i]) for line in (plain if i > 2 else lines)) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown_table(rows: Sequence[Row], columns: Sequence[str] = HEAD) -> str:
    """Return a table for a page."""
    head, *lines = _table(rows, columns)
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def summary(rows: Sequence[Row]) -> str:
    """Return a line for each case: the product's time, and how many times longer each baseline takes."""
    cases: dict[tuple[object, ...], list[Row]] = {}
    for r in rows:
        cases.setdefault((r.suite, what(r), r.shape), []).append(r)
    lines = []
    for (suite, name, _), found in cases.items():
        ours = next((r for r in found if r.variant == r.product and r.p50 is not None), None)
        if ours is None:
            continue
        against = [f"{r.variant} {_short(r)}" for r in found if r.variant != r.product]
        facts = [f"p99 {_g(ours.p99, 3)}", _share(ours), f"{ours.launches} launches" if ours.launches else ""]
        line = f"{suite}: {name}: {ours.variant} {_g(ours.p50, 3)} ms ({', '.join(f for f in facts if f)})"
        lines.append(f"{line}; {', '.join(against)}" if against else line)
    return "\n".join(dict.fromkeys(lines))


def _short(row: Row) -> str:
    if row.ratio is not None:
        return f"{row.ratio:.2f}x"
    return "differs: no ratio" if row.gate == "failed" else "not measured"


def machine_of(rows: Sequence[Row]) -> str:
    """Return hardware, versions, commit and day of a file's rows."""
    r = rows[0]
    clock = f", {r.clock_mhz} of {r.clock_max_mhz} MHz" if r.clock_mhz else ""
    where = f"{r.gpu}, driver {r.driver}{clock}, host {r.cpu}" if r.gpu else r.label
    versions = f"torch {r.torch_version}" + (f", triton {r.triton_version}" if r.gpu else "")
    return f"{where}; Python {r.python}, {versions}; commit {r.commit or 'unknown'}, {r.date[:10]}"


def results_page(files: Sequence[Path]) -> str:
    """Return `RESULTS.md`: every results file, newest first."""
    parts = [_PREAMBLE]
    for path in sorted(files, key=lambda p: read(p)[0].date, reverse=True):
        rows = read(path)
        parts.append(f"## {rows[0].gpu or rows[0].cpu}\n\n{machine_of(rows)}. [{path.name}](results/{path.name})\n")
        if path.with_suffix(".png").exists():
            parts.append(f"![latency, ratios and roofline](results/{path.stem}.png)\n")
        for suite in dict.fromkeys(r.suite for r in rows):
            of_suite = [r for r in rows if r.suite == suite]
            parts.append(f"### {suite}\n\n{markdown_table(of_suite)}\n")
            parts += [f"- {line}\n" for line in splits(of_suite)]
        if (predicted := path.with_name(f"{path.stem}-predicted.md")).exists():
            parts.append(f"### predicted\n\n{predicted.read_text()}")
    return "\n".join(parts)


def readme_tables(files: Sequence[Path]) -> str:
    """Return for each of these files a table of plans and updates of up to 5M for one environment, with baselines."""
    return "\n\n".join(_readme_table(read(path)) for path in files)


def _readme_table(rows: Sequence[Row]) -> str:
    shown = [r for r in rows if r.suite in ("planner", "update") and r.envs in (None, 1) and r.actions == 6]
    shown = [r for r in shown if r.size is not None and r.size <= 5 and r.p50 is not None]
    return f"{machine_of(rows)}:\n\n{markdown_table(shown, ('what', 'by', 'p50 ms', 'p20, p80, p99', 'ratio'))}"


def with_table(readme: str, table: str) -> str:
    """Return the README's text with its table replaced."""
    start, end = map(re.escape, _MARKS)
    text, count = re.subn(f"({start}\n).*?({end})", lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.S)
    if count != 1:
        raise ValueError(f"README: got {count} tables, allowed: one between {_MARKS[0]!r} and {_MARKS[1]!r}")
    return text


def shown_in_readme(files: Sequence[Path]) -> list[Path]:
    """Return the newest result with plans of a GPU, and that of a CPU, as far as there are any."""
    newest: dict[bool, Path] = {}
    for path in sorted(files, key=lambda path: read(path)[0].date):
        rows = read(path)
        if any(r.suite == "planner" for r in rows):
            newest[bool(rows[0].gpu)] = path
    return [newest[gpu] for gpu in (True, False) if gpu in newest]


def main(argv: Sequence[str] | None = None) -> int:
    """Regenerate the pages; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    folder = Path(args[0]) if args else Path(__file__).resolve().parent / "results"
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"{folder}: no results files, allowed: a folder with what `tdmpc2-fast bench` writes", file=sys.stderr)
        return 2
    try:
        for path in files:
            from .plots import draw

            print(draw(read(path), path.with_suffix(".png")))
        page, readme = folder.parent / "RESULTS.md", folder.parent.parent / "README.md"
        page.write_text(results_page(files))
        if shown := shown_in_readme(files):
            readme.write_text(with_table(readme.read_text(), readme_tables(shown)))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{page} and the table in {readme} are made from {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
