"""The world model and its files."""
