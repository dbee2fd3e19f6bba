"""Other people's implementations, measured beside ours."""
