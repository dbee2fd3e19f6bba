"""Curves, plans and episodes as pictures and videos."""
