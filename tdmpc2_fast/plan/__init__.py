"""Planning: `Planner`, and the backends that compute a plan."""
