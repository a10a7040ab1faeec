"""Layouts of the model in which decoding is fast on a CPU."""
