"""Learning: the replay, `Updater`, and the backends that compute an update."""
