"""What a GPU has to show: `make gpu` and the parts it runs."""
