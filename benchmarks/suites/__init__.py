"""What is measured: a file a suite of `tdmpc2-fast bench`."""
