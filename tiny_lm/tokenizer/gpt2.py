"""GPT-2's own tokenizer, with its published vocabulary of 50,257 tokens."""

from collections.abc import Iterable
from typing import ClassVar

from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.tokenizer.bpe import GPT2_PATTERN, BPETokenizer
from tiny_lm.tokenizer.config import GPT2_BASE_SIZE, TokenizerConfig


class GPT2Tokenizer(BPETokenizer):
    """The vocabulary of Radford et al. (2019): ``<|endoftext|>`` (50256) is eos and bos, further tokens follow it."""

    kind: ClassVar[str] = "gpt2"
    libraries: ClassVar[tuple[str, ...]] = ("tiktoken",)
    patterns: ClassVar[tuple[str, ...]] = (GPT2_PATTERN,)

    @classmethod
    def train(cls, config: TokenizerConfig, documents: Iterable[str] = ()) -> Self:
        """Fetch the published vocabulary; ``documents`` are ignored.

        Raises:
            UserError: it is not in tiktoken's cache and cannot be downloaded.
        """
        import tiktoken

        try:
            published = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a file that is not the published one
            raise UserError(
                f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): connect to the "
                "network once, point TIKTOKEN_CACHE_DIR to a folder that has it, or train your own with `type: BPE`"
            ) from error
        base = [published.decode_single_token_bytes(i) for i in range(GPT2_BASE_SIZE)]
        return cls(base, config.special_tokens)
