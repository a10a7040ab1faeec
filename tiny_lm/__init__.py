"""tiny-lm: pre-train small language models from raw text and ship them everywhere.

Importing this package loads no torch. The public Python names live in their rooms, for example
``tiny_lm.tokenizer.load_tokenizer`` and ``tiny_lm.inference.TextGenerator``.
"""

__version__ = "0.1.0"
