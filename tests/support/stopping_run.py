"""The command line in a process that gets a signal at a chosen moment: `python stopping_run.py SIGNAL WHERE N WORD...`.

WHERE: `step`, `update` or `plan`, of which the N-th is begun; or `flush`, of files on their way to the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tdmpc2_fast import TDMPC2, Planner
from tdmpc2_fast.model import files
from tdmpc2_fast.train import cli
from tdmpc2_fast.train.run.trainer import OnlineTrainer

PLACES: dict[str, tuple[Any, str]] = {
    "step": (OnlineTrainer, "step"),
    "update": (TDMPC2, "update"),
    "plan": (Planner, "plan"),
    "flush": (files, "flush"),
}


def main(number: int, where: str, nth: int, words: list[str]) -> int:
    owner, name = PLACES[where]
    method, count = getattr(owner, name), 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            # As a terminal and a cluster send it: to the environments' processes, too.
            os.killpg(0, number)
        return method(*args, **kwargs)

    setattr(owner, name, watched)
    return cli.main(words)


if __name__ == "__main__":
    # A shell's background job ignores Ctrl-C, and so do its children; this one is in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
