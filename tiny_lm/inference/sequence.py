"""One sequence: a prompt and everything generated for it so far."""

import torch
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.inference.request import Completion, FinishReason, GenerationConfig, TokenLogprobs
from tiny_lm.inference.stopping import StopStrings
from tiny_lm.tokenizer import Tokenizer

_RANDOM_BLOCK = 64
"""Random numbers are generated in blocks of this size to amortize the overhead of a call."""


class SequenceState:
    """A prompt and everything generated for it so far; only the thread that decodes changes it.

    Attributes:
        prompt: as text.
        prompt_ids: at least one token.
        config: how to generate.
        suppress_mask: bool ``[V]``, tokens that are never sampled, except ``stop_token_ids``.
        stop_token_ids: tokens that end the text.
        token_ids: prompt and sampled tokens.
        chunks: for each sampled token, the text that it made final; may be empty.
        logprobs: of the sampled tokens, if ``config.logprobs`` is set.
        stop_logprobs: of the token that ended the text, if ``config.logprobs`` is set.
        finish_reason: None until the sequence has ended.
        slot: index of its buffers in the :class:`BatchDecoder`.
        context: the tokens that must be cached before the next one is sampled.
        num_cached: how many of these are cached.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        prompt_ids: list[int],
        config: GenerationConfig,
        *,
        suppress_mask: Tensor,
        stop_token_ids: list[int],
        seed: int | None = None,
    ) -> None:
        """Seed the random numbers; ``seed`` None gives different ones each time.

        Raises:
            UserError: the seed is out of range.
        """
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise UserError(f"a seed must be between -2^63 and 2^64 - 1 (it is {seed})")
        self.prompt, self.prompt_ids, self.config = prompt, prompt_ids, config
        self.suppress_mask, self.stop_token_ids = suppress_mask, stop_token_ids
        self.token_ids = list(prompt_ids)
        self.chunks: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.stop_logprobs: TokenLogprobs | None = None
        self.finish_reason: FinishReason | None = None if config.max_new_tokens else "length"
        self.slot = -1
        self.context: list[int] = []
        self.num_cached = 0
        self._random = torch.Generator()  # on the CPU, so that every device samples the same
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)
        self._uniform: list[float] = []
        self._decoder = tokenizer.stream_decoder()
        self._stops = StopStrings(config.stop)

    @property
    def num_generated(self) -> int:
        """Number of sampled tokens, the one that ended the text included."""
        return len(self.chunks)

    @property
    def max_length(self) -> int:
        """Upper bound of the tokens of prompt and completion."""
        return len(self.prompt_ids) + self.config.max_new_tokens

    def next_uniform(self) -> float:
        """Return the random number of [0, 1), a float32, with which the next token is sampled."""
        index = self.num_generated % _RANDOM_BLOCK
        if index == 0:
            self._uniform = torch.rand(_RANDOM_BLOCK, generator=self._random).tolist()
        return self._uniform[index]

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token, and the text that it makes final; set ``finish_reason`` if it ends the sequence."""
        self.token_ids.append(token_id)
        chunk = ""
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
            self.stop_logprobs = logprobs
        else:
            if logprobs is not None:
                self.logprobs.append(logprobs)
            chunk = self._stops.feed(self._decoder.push(token_id))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self.finish_reason or self.num_generated + 1 == self.config.max_new_tokens:
            chunk += self._stops.feed(self._decoder.flush())
            chunk += self._stops.flush()
            self.finish_reason = "stop" if self._stops.found else self.finish_reason or "length"
        self.chunks.append(chunk)

    def completion(self) -> Completion:
        """Return the result of a sequence that has ended."""
        assert self.finish_reason is not None
        ids = self.token_ids[len(self.prompt_ids) :]
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return Completion(self.prompt, "".join(self.chunks), ids, self.finish_reason, self.logprobs)
