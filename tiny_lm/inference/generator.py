"""Text generation with a trained model."""

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
from tiny_lm.inference.batch import BatchDecoder
from tiny_lm.inference.decoding import DecodeStep, decode_step
from tiny_lm.inference.request import Completion, GenerationConfig
from tiny_lm.inference.scoring import PromptScorer, Score, token_logprobs
from tiny_lm.inference.sequence import SequenceState
from tiny_lm.model import ModelConfig, Transformer
from tiny_lm.model.checkpoint import CheckpointModel, load_checkpoint_model
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.runs import Run, is_checkpoint, is_huggingface_folder, open_run, run_folder_of
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from tiny_lm.tokenizer.huggingface_import import load_huggingface_tokenizer

_MAX_BATCH_SIZE = 64
"""Larger batches cost memory and gain nothing."""

_OPENINGS = ("Once upon a time, there was a story about {theme}.", "One day, two friends talked about {theme}.")
"""Each takes a theme of any kind: friendship, a lost dog, the rain."""


class TextGenerator:
    """Generates text with a model and its tokenizer, and scores text.

    Load one with :meth:`from_path` (a run, a checkpoint or an exported folder). :meth:`generate` returns a prompt with
    its completion, :meth:`stream` yields the completion as it is generated, and :meth:`generate_batch` completes many
    prompts together; all three take the same options, the fields of :class:`GenerationConfig`::

        generator = TextGenerator.from_path("runs/my-run")
        print(generator.generate("Once upon a time", max_new_tokens=100, temperature=0.7, seed=1))

    Attributes:
        model: maps ids ``[B, T]`` to logits ``[B, T, V]``.
        tokenizer: text to ids and back.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Put ``model`` into evaluation mode and prepare it for decoding.

        The prepared weights are a snapshot: after further training, build a new generator.

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
        self._decode_model = pack(self.model)
        self._step: DecodeStep = decode_step
        # Never sampled [V]: control tokens, and ids beyond the tokenizer.
        suppressed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        suppressed[tokenizer.vocab_size :] = True
        suppressed[[token.id for token in tokenizer.specials if token.control]] = True
        self._suppress_mask = suppressed.to(model.token_emb.weight.device)

    @classmethod
    def from_path(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Load a run folder, a checkpoint inside one, or a folder in Hugging Face's layout.

        Raises:
            UserError: ``path`` is none of them, or damaged.
        """
        path = Path(path)
        if is_huggingface_folder(path) or path.suffix == ".safetensors":
            return cls.from_export(path, device=device)
        return cls.from_run(path, device=device)

    @classmethod
    def from_run(cls, path: str | Path, *, device: str | None = None) -> Self:
        """Load the best checkpoint of a run folder, or the given ``.ckpt`` of one, with the run's tokenizer.

        Raises:
            UserError: the run or checkpoint does not exist or is damaged.
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
            model_config: the expected config; a checkpoint with another one is refused.
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

        ``tiny-lm export huggingface`` writes such folders, as does transformers' ``save_pretrained``; other models are
        loaded if ``tiny-lm import`` supports them.

        Args:
            folder: holds ``config.json``, ``model.safetensors`` and the tokenizer.
            tokenizer_path: a tokenizer outside the folder.
            device: where to run; by default a GPU if there is one.

        Raises:
            UserError: a file is missing or damaged, or the architecture is not supported.
        """
        folder = Path(folder)
        folder = folder.parent if folder.is_file() else folder
        model, _ = load_huggingface_model(folder)
        tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else load_huggingface_tokenizer(folder)
        return cls(model.to(choose_device(device)), tokenizer)

    def compile(self) -> None:
        """Compile the decode step of a single sequence, which makes it up to three times as fast on a CPU.

        Compiling takes up to half a minute. Logits change by rounding only.

        Raises:
            UserError: the model is not on a CPU, or no compiler is installed.
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
            prompt: may be empty, to generate from scratch.
            max_new_tokens: generation ends after this many tokens, unless the eos token comes first.
            min_new_tokens: the eos token is not sampled before this many tokens.
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
            text: one longer than the context is scored in windows that overlap by half.
            add_bos: prepend the bos token; else the first token has no score.
            eos: score also that the text ends there.

        Raises:
            UserError: the text has no token to score.
        """
        ids = self.tokenizer.encode(text, bos=add_bos, eos=eos)
        if len(ids) < 2:
            raise UserError("the text is too short to be scored: it has no token after the first")
        logprobs = token_logprobs(self._decode_model, ids)
        scored = sum(len(self.tokenizer.token_bytes(token)) for token in ids[1:])
        return Score(ids[1:], logprobs, -sum(logprobs) / math.log(2) / max(scored, 1))

    def generate_story(
        self, theme: str = "friendship", max_length: int = 200, *, seed: int | None = None, candidates: int = 4
    ) -> str:
        """Generate a story on a theme.

        Several candidates start with the theme, and the one that fits it best is returned: the one after which the
        model finds "The story was about <theme>." most likely.

        Args:
            theme: a word or a few, such as ``friendship`` or ``a lost dog``.
            max_length: maximum number of tokens; stories that end before it are preferred.
            seed: the same seed gives the same story.
            candidates: number of stories to choose from, for each of two openings.

        Raises:
            UserError: the theme is empty or longer than 200 characters, or a number is out of its range.
        """
        theme = " ".join(theme.split())
        if not 0 < len(theme) <= 200:
            raise UserError(f"a theme has 1 to 200 characters (it has {len(theme)})")
        if not 1 <= candidates <= _MAX_BATCH_SIZE:
            raise UserError(f"candidates must be between 1 and {_MAX_BATCH_SIZE} (it is {candidates})")
        source = random.Random(seed)
        prompts = [opening.format(theme=theme) for opening in _OPENINGS for _ in range(candidates)]
        seeds = [source.randrange(2**31) for _ in prompts]
        stories = self.generate_batch(prompts, max_new_tokens=max_length, temperature=0.7, top_p=0.95, seed=seeds)
        ended = [story for story in stories if story.finish_reason == "stop"] or stories
        return max((story.prompt + story.text for story in ended), key=lambda story: self._theme_logprob(story, theme))

    def _theme_logprob(self, story: str, theme: str) -> float:
        """Return the log-likelihood of a sentence that names the theme, after a story."""
        claim = len(self.tokenizer.encode(f" The story was about {theme}."))
        return sum(self.score(f"{story} The story was about {theme}.").logprobs[-claim:])

    def truncated_text(self, prompt: str, *, add_bos: bool = True) -> str:
        """Return the beginning of ``prompt`` that does not fit into the context and is dropped."""
        ids = self.tokenizer.encode(prompt, bos=add_bos)
        return self.tokenizer.decode(ids[: max(len(ids) - self.model.config.context_length, 0)])

    def new_sequence(
        self, prompt: str | Sequence[int], config: GenerationConfig, *, seed: int | None = None
    ) -> SequenceState:
        """Validate and encode a prompt for a :class:`BatchDecoder`.

        Args:
            prompt: text, or ids, which are used as they are.
            config: how to generate.
            seed: None for a different text each time.

        Raises:
            UserError: as :meth:`generate_batch`, or an id is not in the vocabulary.
        """
        stop_token_ids = self._stop_token_ids(config)
        context = self.model.config.context_length
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt) if config.add_bos else self.tokenizer.encode(prompt)
        else:
            ids, prompt = list(prompt), self.tokenizer.decode(prompt)
        if not ids:
            raise UserError("the prompt is empty: give some text, or let it begin with the bos token")
        if config.strict and len(ids) > context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens and the context {context:,}: shorten it, or let its beginning be "
                "dropped"
            )
        mask = self._suppress_mask
        return SequenceState(
            self.tokenizer, prompt, ids, config, suppress_mask=mask, stop_token_ids=stop_token_ids, seed=seed
        )

    def new_prompt_scorer(self, prompt: Sequence[int], *, top_logprobs: int = 0) -> PromptScorer:
        """Return a scorer that computes the log-probabilities of a prompt's tokens in parts.

        ``prompt`` has at least one id; ``top_logprobs`` likeliest alternatives are returned at each position.

        Raises:
            UserError: the prompt is longer than the context, or an id is not in the vocabulary.
        """
        self.tokenizer.decode(prompt)
        return PromptScorer(self._decode_model, prompt, top_logprobs=top_logprobs)

    def new_batch(
        self, slots: int, *, max_length: int | None = None, max_prefill_tokens: int | None = None
    ) -> BatchDecoder:
        """Return a batch for the sequences of :meth:`new_sequence`; the arguments are those of BatchDecoder."""
        if isinstance(self._step, CompiledStep):
            max_length = None  # it was compiled for a cache of the whole context
        return BatchDecoder(
            self._decode_model, slots, max_length=max_length, max_prefill_tokens=max_prefill_tokens, step=self._step
        )

    def _run(self, sequences: Sequence[SequenceState]) -> Iterator[str]:
        """Decode sequences to their ends, in batches of limited size, and yield the chunks of text of all of them."""
        waiting = deque(sequence for sequence in sequences if sequence.finish_reason is None)
        max_length = max((sequence.max_length for sequence in waiting), default=1)
        batch = self.new_batch(min(len(waiting), _MAX_BATCH_SIZE), max_length=max_length)
        while waiting or len(batch):
            while waiting and batch.num_free_slots:
                batch.add(waiting.popleft())
            yield from (chunk for sequence in batch.step() if (chunk := sequence.chunks[-1]))

    def _stop_token_ids(self, config: GenerationConfig) -> list[int]:
        """Return the tokens that end a text.

        Raises:
            UserError: a stop token is not a special token of the tokenizer.
        """
        known = {token.text: token.id for token in self.tokenizer.specials}
        for text in config.stop_tokens:
            if text not in known:
                raise UserError(f"{text!r} is not a special token of this model; it has {', '.join(sorted(known))}")
        return [self.tokenizer.eos_id, *(known[text] for text in config.stop_tokens)]


def _with_options(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """Return ``config`` with its fields replaced by ``options``.

    Raises:
        UserError: a value is out of range.
        TypeError: an option is unknown.
    """
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{nearest(name, known)}")
    return replace(config or GenerationConfig(), **options)
