"""Suites whose packages exclude each other's and ours, each in an interpreter of its own."""
