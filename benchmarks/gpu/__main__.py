"""`python -m tdmpc2_fast.benchmarks.gpu [PART ...]`, as `make gpu` calls it."""

import sys

from .parts import main

sys.exit(main())
