"""Evaluate, plot and report what a training run learned."""
