"""The surprise of each token of a text, and the likeliest alternatives."""

from collections.abc import Sequence

import torch

from tiny_lm.model import Transformer
from tiny_lm.pages.surprise import TokenSurprise
from tiny_lm.tokenizer import Tokenizer

_ALTERNATIVES = 5


@torch.inference_mode()
def measure_tokens(model: Transformer, tokenizer: Tokenizer, ids: Sequence[int]) -> list[TokenSurprise]:
    """Return the surprise ``-log2 p`` of each token but the first, which is not predicted.

    Args:
        model: in evaluation mode.
        tokenizer: the model's tokenizer.
        ids: a text of 2 tokens up to the context length.
    """
    logits = model(torch.tensor([ids]))[0, :-1].float()  # [T-1, V]
    logprobs = logits.log_softmax(dim=-1)
    targets = torch.tensor(ids[1:])
    target_logprobs = logprobs.gather(1, targets[:, None])  # [T-1, 1]
    ranks = (logprobs > target_logprobs).sum(dim=-1) + 1
    best = logprobs.topk(min(_ALTERNATIVES, logits.shape[-1]), dim=-1)
    tokens = []
    for index, token in enumerate(targets.tolist()):
        likeliest = zip(best.indices[index].tolist(), best.values[index].exp().tolist(), strict=True)
        alternatives = [(_token_text(tokenizer, other), p) for other, p in likeliest]
        text = tokenizer.token_text(token)
        tokens.append(TokenSurprise.of(text, float(target_logprobs[index]), int(ranks[index]), alternatives))
    return tokens


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; a model may have more ids than its tokenizer."""
    return tokenizer.token_text(token) if token < tokenizer.vocab_size else f"[{token}]"
