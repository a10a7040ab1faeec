"""Text from a trained model."""

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from tiny_lm.config import nearest
from tiny_lm.errors import UserError
from tiny_lm.hardware.device import choose_device
from tiny_lm.inference.backends.compiled import CompiledStep
from tiny_lm.inference.backends.onednn import pack
from tiny_lm.inference.batch import TextBatch
from tiny_lm.inference.decoding import BatchDecoder, Continuation, DecodeStep, decode_step
from tiny_lm.inference.request import Completion, GenerationConfig, GrowingText
from tiny_lm.inference.scoring import PromptScore, Score, token_logprobs
from tiny_lm.model import ModelConfig, Transformer
from tiny_lm.model.checkpoint import CheckpointModel, load_checkpoint_model
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.runs import Run, is_checkpoint, is_huggingface_folder, open_run, run_folder_of
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from tiny_lm.tokenizer.huggingface_import import load_huggingface_tokenizer

_ROWS = 64
"""So many texts are continued at once: more cost memory and gain nothing."""

_OPENINGS = ("Once upon a time, there was a story about {theme}.", "One day, two friends talked about {theme}.")
"""Each takes a theme of any kind: friendship, a lost dog, the rain."""


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
        self._step: DecodeStep = decode_step
        # Tokens that are no text [V]: control tokens, and rows beyond the tokenizer.
        no_text = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        no_text[tokenizer.vocab_size :] = True
        no_text[[token.id for token in tokenizer.specials if token.control]] = True
        self._no_text = no_text.to(model.token_emb.weight.device)

    @classmethod
    def from_path(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Load whatever ``path`` is: a run folder, a checkpoint inside one, or a folder in Hugging Face's layout.

        Raises:
            UserError: it is none of them, or damaged.
        """
        path = Path(path)
        if is_huggingface_folder(path) or path.suffix == ".safetensors":
            return cls.from_export(path, device=device)
        return cls.from_run(path, device=device)

    @classmethod
    def from_run(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Load the best checkpoint of a run folder, or the given ``.ckpt`` of one, with the run's tokenizer.

        Raises:
            UserError: there is no such run or checkpoint, or it is damaged.
        """
        path = Path(path)
        if is_checkpoint(path):
            return cls.from_checkpoint(path, Run(run_folder_of(path)).tokenizer, device=device)
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
        check_same_tokenizer(tokenizer.hash, loaded.tokenizer_hash, tokenizer_path, checkpoint_path)
        return cls(loaded.model.to(choose_device(device)), tokenizer)

    @classmethod
    def from_export(
        cls, folder: str | Path, *, tokenizer_path: str | Path | None = None, device: str | None = None
    ) -> Self:
        """Load a folder in Hugging Face's layout, or any file in it, with its tokenizer.

        It may be one that ``tiny-lm export huggingface`` wrote, one that transformers saved again, or another model
        that ``tiny-lm import`` takes.

        Args:
            folder: holds ``config.json``, ``model.safetensors`` and the tokenizer.
            tokenizer_path: a tokenizer that lies elsewhere.
            device: where to run; by default a GPU if there is one.

        Raises:
            UserError: a file is missing or damaged, or the model is of no family of ours.
        """
        folder = Path(folder)
        folder = folder.parent if folder.is_file() else folder
        model, _ = load_huggingface_model(folder)
        tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else load_huggingface_tokenizer(folder)
        return cls(model.to(choose_device(device)), tokenizer)

    def compile(self) -> None:
        """From now on continue a text that is alone by a compiled step: up to three times as fast, on a CPU.

        Compiling takes up to half a minute. Texts are the same but for rounding.

        Raises:
            UserError: the model is not on a CPU, or there is no compiler.
        """
        self._step = CompiledStep(self.model)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        min_new_tokens: int = 0,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        **options: Any,
    ) -> str:
        """Continue ``prompt`` and return both.

        Args:
            prompt: empty for a text from nothing.
            max_new_tokens: generation ends here, if not at the eos token before.
            min_new_tokens: the eos token is not sampled before this many.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: sample from the k likeliest tokens only.
            top_p: sample from the likeliest tokens that together have this probability only.
            seed: the same seed gives the same text; None for a different one each time.
            options: other fields of :class:`GenerationConfig`, such as ``stop`` or ``repetition_penalty``.

        Raises:
            UserError, TypeError: as :meth:`generate_batch`.
        """
        options |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return prompt + "".join(self.stream(prompt, seed=seed, **options))

    def stream(
        self, prompt: str, config: GenerationConfig | None = None, *, seed: int | None = None, **options: Any
    ) -> Iterator[str]:
        """Yield the completion of ``prompt`` as it is generated, in whole characters.

        The arguments are those of :meth:`generate_batch`, for one prompt.

        Raises:
            UserError, TypeError: as :meth:`generate_batch`; at the call, not at the first chunk.
        """
        return self._run([self.new_sequence(prompt, _with_options(config, options), seed=seed)])

    def generate_batch(
        self,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Continue several prompts at once; each gets the completion that it would get alone.

        Args:
            prompts: of any lengths.
            config: how to generate; None for the defaults.
            seed: one for all, so that equal prompts get equal completions; or one for each; None for different ones
                each time.
            options: fields of :class:`GenerationConfig`, such as ``max_new_tokens`` and ``temperature``; they override
                those of ``config``.

        Raises:
            UserError: an option is out of range; a prompt has no token, or is longer than the context and ``strict``
                is set; a stop token is not a special token of the tokenizer; or the number of seeds is not that of
                prompts.
            TypeError: an option is unknown.
        """
        config = _with_options(config, options)
        seeds = [seed] * len(prompts) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts")
        sequences = [self.new_sequence(prompt, config, seed=own) for prompt, own in zip(prompts, seeds, strict=True)]
        for _ in self._run(sequences):
            pass
        return [sequence.completion() for sequence in sequences]

    def score(self, text: str, *, add_bos: bool = True, eos: bool = False) -> Score:
        """Return how likely the model finds ``text``.

        Args:
            text: what is scored; a text longer than the context in windows that overlap by half.
            add_bos: as at the beginning of a document; else the first token is given and has no score.
            eos: score also that the text ends there.

        Raises:
            UserError: there is no token to score.
        """
        ids = self.tokenizer.encode(text, bos=add_bos, eos=eos)
        if len(ids) < 2:
            raise UserError("the text is too short to be scored: it has no token after the first")
        logprobs = token_logprobs(self._packed, ids)
        scored = sum(len(self.tokenizer.token_bytes(token)) for token in ids[1:])
        return Score(ids[1:], logprobs, -sum(logprobs) / math.log(2) / max(scored, 1))

    def generate_story(
        self, theme: str = "friendship", max_length: int = 200, *, seed: int | None = None, candidates: int = 4
    ) -> str:
        """Tell a story on a theme.

        Some stories are begun with the theme, and the one is returned that says most about it: the one after which the
        model finds "The story was about <theme>." most likely.

        Args:
            theme: a word or a few, such as ``friendship`` or ``a lost dog``.
            max_length: most tokens of the story; stories that end by themselves are preferred.
            seed: the same seed gives the same story.
            candidates: stories to choose from, with each of two openings.

        Raises:
            UserError: the theme is empty or longer than 200 characters, or a number is out of its range.
        """
        theme = " ".join(theme.split())
        if not 0 < len(theme) <= 200:
            raise UserError(f"a theme has 1 to 200 characters (it has {len(theme)})")
        if not 1 <= candidates <= _ROWS:
            raise UserError(f"candidates must be between 1 and {_ROWS} (it is {candidates})")
        request = GenerationConfig(max_new_tokens=max_length, temperature=0.7, top_p=0.95)
        source = random.Random(seed)
        prompts = [opening.format(theme=theme) for opening in _OPENINGS for _ in range(candidates)]
        told = self.generate_batch(prompts, request, seed=[source.randrange(2**31) for _ in prompts])
        ended = [story for story in told if story.finish_reason == "stop"] or told
        return max((story.prompt + story.text for story in ended), key=lambda story: self._is_about(story, theme))

    def _is_about(self, story: str, theme: str) -> float:
        """Return the log-likelihood of a sentence that names the theme, behind a story."""
        claim = len(self.tokenizer.encode(f" The story was about {theme}."))
        return sum(self.score(f"{story} The story was about {theme}.").logprobs[-claim:])

    def dropped(self, prompt: str, *, add_bos: bool = True) -> str:
        """Return the beginning of ``prompt`` that does not fit into the context and is not read."""
        ids = self.tokenizer.encode(prompt, bos=add_bos)
        return self.tokenizer.decode(ids[: max(len(ids) - self.model.config.context_length, 0)])

    def new_sequence(
        self, prompt: str | Sequence[int], request: GenerationConfig, *, seed: int | None = None
    ) -> GrowingText:
        """Check a prompt, and make it a text that a batch can take in.

        Args:
            prompt: text, or ids, which are taken as they are.
            request: how to go on.
            seed: None for another text each time.

        Raises:
            UserError: as :meth:`generate_batch`, or an id is none of the tokenizer's.
        """
        ends = self._end_tokens(request)
        context = self.model.config.context_length
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt) if request.add_bos else self.tokenizer.encode(prompt)
        else:
            ids, prompt = list(prompt), self.tokenizer.decode(prompt)
        if not ids:
            raise UserError("the prompt is empty: give a beginning, or let the text begin with the bos token")
        if request.strict and len(ids) > context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens and the context {context:,}: shorten it, or let its "
                "beginning be left out"
            )
        wanted = Continuation(
            ids, self._no_text, request.sampling, seed, ends, request.min_new_tokens, request.logprobs
        )
        return GrowingText(self.tokenizer, prompt, wanted, request)

    def new_score(self, prompt: Sequence[int], *, top: int = 0) -> PromptScore:
        """Return a place where the log-probabilities of a prompt's tokens are computed part by part.

        Args:
            prompt: ids, at least one.
            top: tell so many likeliest tokens in each place.

        Raises:
            UserError: the prompt is longer than the context, or an id is none of the tokenizer's.
        """
        self.tokenizer.decode(prompt)
        return PromptScore(self._packed, prompt, top=top)

    def new_batch(self, rows: int, *, length: int | None = None, prompt_tokens: int | None = None) -> TextBatch:
        """Return a batch for what :meth:`new_sequence` makes; the arguments are those of BatchDecoder."""
        if isinstance(self._step, CompiledStep):
            length = None  # it was compiled for a cache of the whole context
        return TextBatch(BatchDecoder(self._packed, rows, length=length, prompt_tokens=prompt_tokens, step=self._step))

    def _run(self, texts: Sequence[GrowingText]) -> Iterator[str]:
        """Continue texts to their ends, as many at once as there are rows, and yield piece after piece of all."""
        waiting = deque(text for text in texts if text.finish_reason is None)
        batch = self.new_batch(min(len(waiting), _ROWS), length=max((text.longest for text in waiting), default=1))
        while waiting or len(batch):
            while waiting and batch.free:
                batch.join(waiting.popleft())
            yield from (piece for _, piece in batch.step() if piece)

    def _end_tokens(self, request: GenerationConfig) -> list[int]:
        """Return the tokens that end a text.

        Raises:
            UserError: a stop token is no special token of the tokenizer.
        """
        known = {token.text: token.id for token in self.tokenizer.specials}
        for text in request.stop_tokens:
            if text not in known:
                raise UserError(f"{text!r} is no special token of this model; it has {', '.join(sorted(known))}")
        return [self.tokenizer.eos_id, *(known[text] for text in request.stop_tokens)]


def _with_options(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """Return ``config`` with its fields replaced by ``options``.

    Raises:
        UserError: a value is out of range.
        TypeError: there is no such field.
    """
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{nearest(name, known)}")
    return replace(config or GenerationConfig(), **options)
