"""Runs of every family, trained for a moment on stories: what the exporters take."""

from tiny_exports import trained_run as trained_run
