"""The command `python -m tdmpc2_fast.benchmarks.gpu [PART ...]`, which `make gpu` calls."""

import sys

from .call import main

sys.exit(main())
