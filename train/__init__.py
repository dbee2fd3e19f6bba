"""What it takes to train: environments, the online loop, evaluation, logs, the command line."""
