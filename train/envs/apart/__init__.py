"""Environments in other processes: copies of this program, or interpreters with packages that exclude ours."""
