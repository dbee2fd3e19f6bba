"""The command `tdmpc2-fast`: its words go to `app`, and what came of it becomes an exit status.

0: fine. 1: it failed while running. 2: what was asked for cannot be. 130: interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from tdmpc2_fast.errors import BackendError, CheckpointError, ConfigError, DataError, InputError

_MISTAKES = (BackendError, CheckpointError, ConfigError, DataError, InputError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        import click

        from .app import app
    except ImportError as e:
        if e.name not in ("click", "rich"):
            raise
        print(f"error: the command line needs {e.name}; pip install 'tdmpc2-fast[train]'", file=sys.stderr)
        return 2
    try:
        return int(app.main(args, prog_name="tdmpc2-fast", standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except click.UsageError as e:
        print(f"error: {e.format_message()} (tdmpc2-fast --help lists the commands)", file=sys.stderr)
        return 2
    except Exception as e:  # the simulators of others raise what they like
        return _failed(e, args)


def _failed(e: Exception, args: Sequence[str]) -> int:
    """Say what went wrong; where, too, if asked to."""
    from .sweep import tell

    debug = os.environ.get("TDMPC2_DEBUG", "0") not in ("", "0") or "debug=true" in map(str.lower, args)
    if debug:
        traceback.print_exception(e)
    plain = isinstance(e, OSError) or type(e).__module__.startswith("tdmpc2_fast.")
    message = str(e) if plain else f"{type(e).__name__}: {' '.join(str(e).split())}"
    tell(error=message)
    print(f"error: {message}", file=sys.stderr)
    for note in getattr(e, "__notes__", ()):
        print(note, file=sys.stderr)
    if isinstance(e, _MISTAKES):
        return 2
    if not debug:
        print("with TDMPC2_DEBUG=1 in the environment it shows where that was raised", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
