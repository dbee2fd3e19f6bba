"""Whether runs end where the published ones do: a list of them, what runs them, and a page of what came of it."""
