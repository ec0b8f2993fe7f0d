"""Measurements; each module prints a table and ends with one JSON line, and checks correctness before it times."""
