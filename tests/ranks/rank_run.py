"""A run under torchrun whose first rank kills itself once an episode has ended KILL decisions in, before any restart.

torchrun ... rank_run.py KILL key=value ...
"""

from __future__ import annotations

import os
import signal
import sys

from tdmpc2_fast.train.api import Event, train
from tdmpc2_fast.train.cli import keys


def main() -> None:
    """Train, or die."""
    kill, words = int(sys.argv[1]), sys.argv[2:]

    def callback(event: Event) -> None:
        if event.step >= kill and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    train(callbacks=callback, **keys.parse(words))


if __name__ == "__main__":
    main()
