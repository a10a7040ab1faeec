"""Copies of the model whose layers are optimized for decoding on a CPU."""
