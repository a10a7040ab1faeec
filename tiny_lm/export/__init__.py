"""Trained models in the formats of other programs, each proven to be the same model."""
