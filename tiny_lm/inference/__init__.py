"""Using a trained model: drawing tokens, generating text, scoring text."""

from tiny_lm.inference.generator import TextGenerator
from tiny_lm.inference.request import Completion, GenerationConfig
from tiny_lm.inference.sampling import SamplingParams, sample
from tiny_lm.inference.scoring import LossStats, evaluate_loss

__all__ = ["Completion", "GenerationConfig", "LossStats", "SamplingParams", "TextGenerator", "evaluate_loss", "sample"]
