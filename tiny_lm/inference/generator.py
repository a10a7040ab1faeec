"""Text from a trained model."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.inference.sampling import Sampling, sample
from tiny_lm.model import Transformer
from tiny_lm.model.checkpoint import CheckpointModel, load_checkpoint_model
from tiny_lm.model.config import ModelConfig
from tiny_lm.runs import Run, open_run
from tiny_lm.tokenizer import Tokenizer, load_tokenizer

MAX_NEW_TOKENS = 100_000


class TextGenerator:
    """Continues text with a model and its tokenizer.

    Attributes:
        model: maps ids ``[B, T]`` to logits ``[B, T, V]``.
        tokenizer: text to ids and back.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Generate with ``model``, which is put into evaluation mode.

        Raises:
            UserError: the tokenizer has more tokens than the model.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_run(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Load the best checkpoint of a run folder, or the given ``.ckpt`` of one, with the run's tokenizer.

        Raises:
            UserError: there is no such run or checkpoint, or it is damaged.
        """
        path = Path(path)
        if path.suffix == ".ckpt":
            return cls.from_checkpoint(path, Run(path.parent.parent).tokenizer, device=device)
        run = open_run(path)
        return cls.from_checkpoint(run.model_checkpoint(), run.tokenizer, device=device)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        tokenizer_path: str | Path,
        *,
        model_config: ModelConfig | None = None,
        device: str | None = None,
    ) -> Self:
        """Load a checkpoint and a tokenizer folder (or any file in it).

        Args:
            checkpoint_path: a ``.ckpt`` file that training wrote.
            tokenizer_path: the tokenizer that the model was trained with; another one is refused.
            model_config: what the caller believes the model to be; a checkpoint of another one is refused.
            device: where to run; by default a GPU if there is one.

        Raises:
            UserError: a file is missing or damaged, or they do not belong together.
        """
        loaded: CheckpointModel = load_checkpoint_model(Path(checkpoint_path), config=model_config)
        tokenizer = load_tokenizer(tokenizer_path)
        if tokenizer.hash != loaded.tokenizer_hash:
            raise UserError(f"{tokenizer_path}: is not the tokenizer that {checkpoint_path} was trained with")
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(loaded.model.to(chosen), tokenizer)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        min_new_tokens: int = 0,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        add_bos: bool = True,
    ) -> str:
        """Return prompt and continuation; the arguments are those of :meth:`stream`."""
        sampling = Sampling(temperature, top_k, top_p)
        pieces = self.stream(prompt, max_new_tokens, min_new_tokens, sampling=sampling, seed=seed, add_bos=add_bos)
        return prompt + "".join(pieces)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        min_new_tokens: int = 0,
        *,
        sampling: Sampling | None = None,
        seed: int | None = None,
        add_bos: bool = True,
    ) -> Iterator[str]:
        """Yield the continuation as it is made, in whole characters.

        Args:
            prompt: the beginning of the text; empty for a text from nothing.
            max_new_tokens: most tokens to generate; generation also ends at the eos token.
            min_new_tokens: the eos token is not drawn before this many.
            sampling: temperature and truncation.
            seed: the same seed gives the same text; None for another one each time.
            add_bos: begin with the beginning-of-text token, as each document of the training stream does.

        Raises:
            UserError: a number is out of its range, or there is nothing to begin with.
        """
        if not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"max-new-tokens must be between 0 and {MAX_NEW_TOKENS:,} (it is {max_new_tokens})")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise UserError(f"min-new-tokens must be between 0 and max-new-tokens (it is {min_new_tokens})")
        ids = self.tokenizer.encode(prompt, bos=add_bos)
        if not ids:
            raise UserError("the prompt is empty: give a beginning, or let the text begin with the bos token")
        return self._continue(ids, max_new_tokens, min_new_tokens, sampling or Sampling(), seed)

    def _continue(
        self, ids: list[int], max_new_tokens: int, min_new_tokens: int, sampling: Sampling, seed: int | None
    ) -> Iterator[str]:
        random = torch.Generator()
        if seed is None:
            random.seed()
        else:
            random.manual_seed(seed)
        decoder = self.tokenizer.stream_decoder()
        forbidden = self._never_drawn()  # [V]
        eos_id = self.tokenizer.eos_id
        for count, logits in enumerate(self._next_logits(ids, max_new_tokens)):
            logits = logits.masked_fill(forbidden, float("-inf"))
            if count < min_new_tokens:
                logits[:, eos_id] = float("-inf")
            token = int(sample(logits, sampling, torch.rand(1, generator=random)))
            if token == eos_id:
                break
            ids.append(token)
            text = decoder.push(token)
            if text:
                yield text
        rest = decoder.flush()
        if rest:
            yield rest

    @torch.no_grad()
    def _next_logits(self, ids: list[int], count: int) -> Iterator[Tensor]:
        """Yield ``count`` times the logits ``[1, V]`` that follow ``ids``, to which the caller adds what it chose.

        Where the text outgrows the context, the window slides: its later half is read again, from position 0. So
        learned positions and rotary ones are treated alike, and the oldest text is forgotten half a context at a time.
        """
        context = self.model.config.context_length
        cache = self.model.new_cache(1)
        unread = ids[-context:]
        for _ in range(count):
            if cache.length + len(unread) > context:
                cache.length = 0
                unread = ids[-(context + 1) // 2 :]
            input_ids = torch.tensor([unread], device=cache.keys[0].device)  # [1, T]
            hidden = self.model.hidden_states(input_ids, cache)[:, -1]  # [1, D]
            yield self.model.lm_head(hidden).float()
            unread = ids[-1:]

    def _never_drawn(self) -> Tensor:
        """Return a mask ``[V]`` of tokens that are no text: control tokens, and rows beyond the tokenizer."""
        tokenizer = self.tokenizer
        mask = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        mask[tokenizer.vocab_size :] = True
        mask[[token.id for token in tokenizer.specials if token.control]] = True
        mask[tokenizer.eos_id] = False
        return mask.to(self.model.token_emb.weight.device)
