"""Replay recorded official numbers through an implementation, draw by draw.

python tests/golden_check.py DIR [--implementation reference|torch|triton] [--case NAME]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from golden_runner import main

if __name__ == "__main__":
    sys.exit(main())
