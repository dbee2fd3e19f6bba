"""The numbers of a run: where they are written and how they are shown."""
