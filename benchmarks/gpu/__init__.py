"""All that is tried and measured on a GPU: `make gpu` and the parts it runs."""
