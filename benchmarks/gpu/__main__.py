"""The command `python -m tdmpc2_fast.benchmarks.gpu [PART ...]`, which `make gpu` calls."""

import sys

from .parts import main

sys.exit(main())
