"""The modules of the official `common`, under their names: same arguments, attributes, shapes and state dicts."""
