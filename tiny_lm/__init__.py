"""tiny-lm: pre-train small language models from raw text and ship them everywhere.

Importing this package does not load torch. Other public names are in subpackages, for example
``tiny_lm.tokenizer.load_tokenizer``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiny_lm.inference import TextGenerator

__all__ = ["TextGenerator", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name == "TextGenerator":
        from tiny_lm.inference import TextGenerator

        return TextGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
