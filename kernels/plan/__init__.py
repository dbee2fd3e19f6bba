"""A plan: MPPI, its random draws, and the chain of launches that makes one."""
