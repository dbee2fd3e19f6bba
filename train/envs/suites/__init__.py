"""Suites whose packages live in an interpreter of their own."""
