"""How surprised a model is by each token of a text, and what it would have said instead."""

from collections.abc import Sequence

import torch

from tiny_lm.model import Transformer
from tiny_lm.pages.surprise import TokenSurprise
from tiny_lm.tokenizer import Tokenizer

_ALTERNATIVES = 5


@torch.inference_mode()
def measure_tokens(model: Transformer, tokenizer: Tokenizer, ids: Sequence[int]) -> list[TokenSurprise]:
    """Return the surprise ``-log2 p`` of each token but the first, which nothing foretells.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        ids: a text of 2 tokens up to the context of the model.
    """
    logits = model(torch.tensor([ids]))[0, :-1].float()  # [T-1, V]
    log_probabilities = logits.log_softmax(dim=-1)
    targets = torch.tensor(ids[1:])
    own = log_probabilities.gather(1, targets[:, None])  # [T-1, 1]
    ranks = (log_probabilities > own).sum(dim=-1) + 1
    best = log_probabilities.topk(min(_ALTERNATIVES, logits.shape[-1]), dim=-1)
    tokens = []
    for place, token in enumerate(targets.tolist()):
        alternatives = zip(best.indices[place].tolist(), best.values[place].exp().tolist(), strict=True)
        told = [(_token_text(tokenizer, other), share) for other, share in alternatives]
        tokens.append(TokenSurprise.of(tokenizer.token_text(token), float(own[place]), int(ranks[place]), told))
    return tokens


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; a model may have more ids than its tokenizer."""
    return tokenizer.token_text(token) if token < tokenizer.vocab_size else f"[{token}]"
