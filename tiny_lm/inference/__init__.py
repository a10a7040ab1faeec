"""Inference with a trained model: sampling, text generation, scoring.

A prompt passes through four types on its way to a token, and each has one reason to exist:

1. :class:`~tiny_lm.inference.request.GenerationConfig`: what the caller asks for, validated, without the prompt.
2. :class:`~tiny_lm.inference.sequence.SequenceState`: one prompt and everything generated for it; only the thread that
   decodes changes it.
3. :class:`~tiny_lm.inference.batch.BatchDecoder`: the sequences that share prefill and decode steps.
4. :class:`~tiny_lm.inference.sequence.TokenLogprobs`: a sampled token, where log-probabilities were asked for.

The server has two more, before and after: the HTTP body, and the ``RequestHandle`` through which other threads read.
"""

from tiny_lm.inference.generator import TextGenerator
from tiny_lm.inference.request import Completion, GenerationConfig
from tiny_lm.inference.sampling import SamplingParams, sample
from tiny_lm.inference.scoring import LossStats, evaluate_loss

__all__ = ["Completion", "GenerationConfig", "LossStats", "SamplingParams", "TextGenerator", "evaluate_loss", "sample"]
