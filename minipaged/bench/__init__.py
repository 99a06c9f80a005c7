"""Measurements: each module measures one thing and returns plain data; ``report.py`` words it."""
