"""The command line in processes that get a signal at a chosen moment.

`python stopping_run.py` reads commands, a line of JSON each: the `words`, the folder `out` for what it prints, and the
`signal` that comes at the `nth` time that something is begun: a `step`, an `update`, a `plan`, or a `flush` of files on
their way to the disk. Each runs in a fork of a process that has only imported what a run needs; a line with its exit
status answers.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from typing import Any

IMPORTED = (
    *("gymnasium.envs.classic_control", "matplotlib.pyplot", "scipy.stats", "tensorboard.summary.writer.record_writer"),
    *("tensorboard.compat.proto.event_pb2", "torch._dynamo", "interpreter", "tdmpc2_fast.train.run.lifecycle"),
)
"""What a run imports; each takes long."""


def serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            for at, name in ((0, os.devnull), (1, f"{asked['out']}/stdout"), (2, f"{asked['out']}/stderr")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), at)
            # As in any other process: what nobody seeds is different in each.
            random.seed()
            sys.modules["numpy"].random.seed()
            sys.exit(run(asked["signal"], asked["where"], asked["nth"], asked["words"]))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(number: int, where: str, nth: int, words: list[str]) -> int:
    from tdmpc2_fast import TDMPC2, Planner
    from tdmpc2_fast.model import files
    from tdmpc2_fast.train import cli
    from tdmpc2_fast.train.run.trainer import OnlineTrainer

    owner: Any = dict(step=OnlineTrainer, update=TDMPC2, plan=Planner, flush=files)[where]
    method, count = getattr(owner, where), 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            # As a terminal and a cluster send it: to the environments' processes, too.
            os.killpg(0, number)
        return method(*args, **kwargs)

    setattr(owner, where, watched)
    return cli.main(words)


if __name__ == "__main__":
    # A shell's background job ignores Ctrl-C, and so do its children; this one is in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
