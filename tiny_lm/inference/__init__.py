"""Inference with a trained model: sampling, text generation, scoring.

A prompt passes through four types on its way to a sampled token:

1. :class:`~tiny_lm.inference.request.GenerationConfig`: what the caller asks for, validated, without the prompt.
2. :class:`~tiny_lm.inference.sequence.SequenceState`: one prompt and everything generated for it; only the thread that
   decodes changes it.
3. :class:`~tiny_lm.inference.batch.BatchDecoder`: the sequences that share prefill and decode steps.
4. :class:`~tiny_lm.inference.request.TokenLogprobs`: a sampled token with its log-probability, if requested.

The server adds two: the HTTP body before these, and the ``RequestHandle`` through which other threads read.
"""

from tiny_lm.inference.generator import TextGenerator
from tiny_lm.inference.request import Completion, GenerationConfig
from tiny_lm.inference.sampling import SamplingParams, sample
from tiny_lm.inference.scoring import LossStats, evaluate_loss

__all__ = ["Completion", "GenerationConfig", "LossStats", "SamplingParams", "TextGenerator", "evaluate_loss", "sample"]
