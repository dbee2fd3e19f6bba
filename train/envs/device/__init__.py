"""Simulators that step many environments at once on the device of the agent, and keep all numbers there."""
