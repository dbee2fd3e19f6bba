"""Tables for a terminal of any width, and for a pipe, where they are plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tdmpc2_fast.config import MODEL_SIZES

from . import keys

_WIDE = 120  # columns from which on nothing needs to wrap
_NARROW_RANGE = 16


def rendered(*parts: RenderableType) -> str:
    """Return the text as standard output shows it: in its width, with colours only where it is a terminal."""
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def grid(rows: Iterable[Sequence[str]], titles: Sequence[str] = (), fixed: int = 1) -> Table:
    """Return a table of columns without lines; the first `fixed` are never broken, the others wrap."""
    rows = [tuple(r) for r in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(titles), header_style="bold")
    for i in range(max(map(len, [titles, *rows]))):
        title = titles[i] if titles else ""
        table.add_column(title, no_wrap=i < fixed, overflow="fold", style="cyan" if i == 0 else "")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def section(title: str, body: RenderableType) -> Group:
    """Return a heading and, indented, what belongs to it."""
    return Group(Text(f"\n{title}", style="bold"), Padding(body, (0, 0, 0, 2)))


def key_tables(own: type[Any] | None, config: bool) -> Group:
    """List every key of a command with default, range and meaning, group by group; then model sizes and presets."""
    rows: list[tuple[str, ...]] = []
    for name, fields in keys.groups(own, config).items():
        rows.append(("", "", ""))
        rows.append((name, "", ""))
        rows += [(f"  {f.name}={keys.default_text(f)}", _allowed(f), f.metadata["help"]) for f in fields]
    table = grid(rows, ("key=default", "allowed", "meaning"))
    if Console().width < _WIDE:
        table.columns[1].max_width = _NARROW_RANGE
    parts: list[RenderableType] = [table]
    if config:
        sizes = [(f"model_size={n}", _words(dims)) for n, dims in MODEL_SIZES.items()]
        parts.append(section("model sizes, in millions of parameters", grid(sizes)))
    if own is keys.Options:
        presets = [(f"preset={name}", _words(values)) for name, values in keys.PRESETS.items()]
        parts.append(section("presets", grid(presets)))
    return Group(*parts)


def _allowed(f: dataclasses.Field[Any]) -> str:
    """Say type and range in few letters, where `describe_range` takes a sentence."""
    kind, meta = str(f.type), f.metadata
    if meta["choices"] is not None:
        text = " | ".join(str(c) for c in meta["choices"] if c is not None)
    elif kind.startswith("bool"):
        text = "true | false"
    else:
        names = {"int": "integer", "float": "number", "str": "text", "Mapping[str, Any]": "env.KEY=VALUE"}
        text = names[kind.removesuffix(" | None")]
        if meta["high"] is not None:
            text += f" {meta['low']} to {meta['high']}"
        elif meta["low"] is not None:
            text += f" {'>' if meta['open_low'] else '>='} {meta['low']}"
    return text + (" | none" if "None" in kind else "")


def _words(values: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in values.items())
