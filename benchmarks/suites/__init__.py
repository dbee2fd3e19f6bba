"""What is measured: one file for each suite of `tdmpc2-fast bench`."""
