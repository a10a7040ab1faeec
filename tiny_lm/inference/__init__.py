"""Using a trained model: drawing tokens, generating text, scoring text."""

from tiny_lm.inference.generator import TextGenerator
from tiny_lm.inference.request import Generated, Request
from tiny_lm.inference.sampling import Sampling, sample
from tiny_lm.inference.scoring import LossStats, evaluate_loss

__all__ = ["Generated", "LossStats", "Request", "Sampling", "TextGenerator", "evaluate_loss", "sample"]
