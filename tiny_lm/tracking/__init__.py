"""Loggers for the metrics of a run."""
