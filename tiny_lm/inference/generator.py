"""Text from a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.inference.decoding import BatchDecoder, Drawn
from tiny_lm.inference.packing import pack
from tiny_lm.inference.sampling import Sampling
from tiny_lm.inference.stopping import StopStrings
from tiny_lm.model import ModelConfig, Transformer
from tiny_lm.model.checkpoint import CheckpointModel, load_checkpoint_model
from tiny_lm.runs import Run, open_run
from tiny_lm.tokenizer import Tokenizer, load_tokenizer

MAX_NEW_TOKENS = 100_000
MAX_LOGPROBS = 100
MAX_PROMPTS = 4096

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to generate, besides the prompt.

    Attributes:
        max_new_tokens: most tokens to generate; generation also ends at the eos token.
        min_new_tokens: the eos token is not drawn before this many.
        sampling: temperature, truncation and penalties.
        stop: strings before the first of which the text ends, wherever token borders fall.
        stop_tokens: texts of special tokens, such as ``<|im_end|>``, that end it as eos does.
        add_bos: begin with the beginning-of-text token, as each document of the training stream does.
        strict: refuse a prompt that is longer than the context, instead of reading its end only.
        logprobs: tell the log-probability of each token, and those of so many likeliest ones in its place.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    add_bos: bool = True
    strict: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"max-new-tokens must be between 0 and {MAX_NEW_TOKENS:,} (it is {self.max_new_tokens})")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min-new-tokens must be between 0 and max-new-tokens (it is {self.min_new_tokens})")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be between 0 and {MAX_LOGPROBS} (it is {self.logprobs})")
        StopStrings(self.stop)


@dataclass(frozen=True)
class Generated:
    """A continued prompt."""

    prompt: str
    text: str
    """The continuation only."""
    ids: list[int]
    """The tokens of the continuation, without the one that ended it. A stop string cuts the text, not these."""
    finish_reason: FinishReason
    """``stop``: at the eos token, a stop token or a stop string; ``length``: after ``max_new_tokens``."""
    drawn: list[Drawn]
    """Every token with its log-probability; empty unless ``logprobs`` was asked for."""


class TextGenerator:
    """Continues text with a model and its tokenizer.

    Attributes:
        model: maps ids ``[B, T]`` to logits ``[B, T, V]``.
        tokenizer: text to ids and back.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Generate with ``model``, which is put into evaluation mode.

        Its weights are looked at now: a model that goes on training takes a new generator each time.

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
        self._packed = pack(self.model)

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
        return cls(loaded.model.to(choose_device(device)), tokenizer)

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
        stop: Sequence[str] = (),
        add_bos: bool = True,
    ) -> str:
        """Return prompt and continuation; the arguments are those of :class:`Request` and :class:`Sampling`.

        Raises:
            UserError: as :meth:`generate_batch`.
        """
        sampling = Sampling(temperature, top_k, top_p)
        request = Request(max_new_tokens, min_new_tokens, sampling, stop=tuple(stop), add_bos=add_bos)
        return prompt + "".join(self.stream(prompt, request, seed=seed))

    def stream(self, prompt: str, request: Request | None = None, *, seed: int | None = None) -> Iterator[str]:
        """Yield the continuation of ``prompt`` as it is made, in whole characters.

        Args:
            prompt: the beginning of the text; empty for a text from nothing.
            request: how to go on.
            seed: the same seed gives the same text; None for another one each time.

        Raises:
            UserError: as :meth:`generate_batch`; at the call, not at the first piece.
        """
        request = request or Request()
        texts = self._begin([prompt], request)
        return (piece for _, piece in self._continue(texts, [seed], request))

    def generate_batch(
        self, prompts: Sequence[str], request: Request | None = None, *, seed: int | Sequence[int] | None = None
    ) -> list[Generated]:
        """Continue several prompts at once; each gets the text that it would get alone.

        Args:
            prompts: of any lengths.
            request: how to go on.
            seed: one for all, so that equal prompts get equal texts; or one for each; None for others each time.

        Raises:
            UserError: there are too many prompts or another number of seeds, a prompt has no token to begin with, or
                is longer than the context and ``request.strict``, or a stop token is none of the tokenizer's.
        """
        request = request or Request()
        if len(prompts) > MAX_PROMPTS:
            raise UserError(f"{len(prompts):,} prompts are too many: at most {MAX_PROMPTS:,} at once")
        seeds = [seed] * len(prompts) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts")
        texts = self._begin(prompts, request)
        for text, piece in self._continue(texts, seeds, request):
            text.pieces.append(piece)
        return [text.result() for text in texts]

    def dropped(self, prompt: str, *, add_bos: bool = True) -> str:
        """Return the beginning of ``prompt`` that does not fit into the context and is not read."""
        ids = self.tokenizer.encode(prompt, bos=add_bos)
        return self.tokenizer.decode(ids[: max(len(ids) - self.model.config.context_length, 0)])

    def _begin(self, prompts: Sequence[str], request: Request) -> list["_Text"]:
        """Check and encode the prompts."""
        ends = self._end_tokens(request)
        context = self.model.config.context_length
        texts = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt, bos=request.add_bos)
            if not ids:
                raise UserError("the prompt is empty: give a beginning, or let the text begin with the bos token")
            if request.strict and len(ids) > context:
                raise UserError(
                    f"the prompt has {len(ids):,} tokens and the context {context:,}: shorten it, or let its "
                    "beginning be left out"
                )
            texts.append(_Text(self.tokenizer, prompt, ids, ends, request))
        return texts

    def _continue(
        self, texts: Sequence["_Text"], seeds: Sequence[int | None], request: Request
    ) -> Iterator[tuple["_Text", str]]:
        """Yield piece after piece of all texts, each with the text that it belongs to."""
        if not texts:
            return
        decoder = BatchDecoder(
            self._packed,
            [text.prompt_ids for text in texts],
            request.sampling,
            seeds,
            forbidden=self._never_drawn(request),
            ends=self._end_tokens(request),
            min_new_tokens=request.min_new_tokens,
            logprobs=request.logprobs,
        )
        for _ in range(request.max_new_tokens):
            for drawn in decoder.step():
                text = texts[drawn.row]
                if piece := text.take(drawn):
                    yield text, piece
                if text.finish_reason == "stop":
                    decoder.finish(drawn.row)
            if not decoder.active:
                break
        for text in texts:
            if rest := text.flush():
                yield text, rest

    def _end_tokens(self, request: Request) -> list[int]:
        """Return the tokens that end a text.

        Raises:
            UserError: a stop token is no special token of the tokenizer.
        """
        known = {token.text: token.id for token in self.tokenizer.specials}
        for text in request.stop_tokens:
            if text not in known:
                raise UserError(f"{text!r} is no special token of this model; it has {', '.join(sorted(known))}")
        return [self.tokenizer.eos_id, *(known[text] for text in request.stop_tokens)]

    def _never_drawn(self, request: Request) -> Tensor:
        """Return a mask ``[V]`` of tokens that are no text: control tokens, and rows beyond the tokenizer."""
        tokenizer = self.tokenizer
        mask = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        mask[tokenizer.vocab_size :] = True
        mask[[token.id for token in tokenizer.specials if token.control]] = True
        mask[self._end_tokens(request)] = False
        return mask.to(self.model.token_emb.weight.device)


class _Text:
    """A text in the making: what becomes of the tokens that are drawn for it."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], ends: Sequence[int], request: Request
    ) -> None:
        self.prompt, self.prompt_ids = prompt, prompt_ids
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.drawn: list[Drawn] = []
        self.finish_reason: FinishReason = "length"
        self._ends = ends
        self._tells = request.logprobs is not None
        self._decoder = tokenizer.stream_decoder()
        self._stops = StopStrings(request.stop)

    def take(self, drawn: Drawn) -> str:
        """Add a token and return the text that is now certain."""
        if drawn.id in self._ends:
            self.finish_reason = "stop"
            return ""
        self.ids.append(drawn.id)
        if self._tells:
            self.drawn.append(drawn)
        piece = self._stops.push(self._decoder.push(drawn.id))
        if self._stops.found:
            self.finish_reason = "stop"
        return piece

    def flush(self) -> str:
        """End the text and return what was not certain before."""
        rest = self._stops.push(self._decoder.flush())
        if self._stops.found:
            self.finish_reason = "stop"
        return rest + self._stops.flush()

    def result(self) -> Generated:
        """Return the text as it is now."""
        return Generated(self.prompt, "".join(self.pieces), self.ids, self.finish_reason, self.drawn)


def choose_device(device: str | None) -> torch.device:
    """Return the device of that name, or a GPU if there is one, or the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
