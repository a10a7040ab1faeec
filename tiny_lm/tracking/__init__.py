"""Loggers: where the metrics of a run go."""
