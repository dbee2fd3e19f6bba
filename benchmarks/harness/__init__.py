"""How measuring is done: cases, turns, gates, and the machine."""
