"""`python -m tdmpc2_fast.train task=dog-run ...`, as the official `python train.py` is called."""

import sys

from .cli import main

sys.exit(main())
