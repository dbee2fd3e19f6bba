"""How it is measured: cases, turns, gates, and the machine."""
