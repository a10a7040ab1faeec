"""What the tests of this folder share: corpora, hard texts, and small configs."""

import random

from tiny_lm.tokenizer import BPETokenizer, GPT2Tokenizer, TokenizerConfig

KINDS = ("BPE", "sentencepiece", "char", "gpt2")

# The byte order of GPT-2's published vocabulary: printable Latin-1 first.
GPT2_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
GPT2_BYTES += [byte for byte in range(256) if byte not in GPT2_BYTES]

HARD = [
    "",
    " ",
    "\n",
    "Hello world",
    " a  b   c    d ",
    "tabs\tand\t\ttabs",
    "line\nline\n\nline\r\nline \n \n end",
    "it's I'LL we'Re they've 'ſ don''t",
    "1 12 123 1234 12345 3.14 1,000,000 ½ Ⅷ ٣٤٥",
    "!?... --- (a) [b] {c} <d> \"e\" 'f' a.b,c;d:e/f\\g|h",
    "😀 👨‍👩‍👧‍👦 🇯🇵 ✌🏽 e\u0301 ñ ß ﬁ",
    "漢字かな交じり文、한국어 العربية עברית हिन्दी ไทย Ελληνικά кириллица",
    "\x00 \x01 \x1c \x7f \x85 \xa0 \u200b \u2028 \u3000 \ufeff \ufffd \ue000 \U0010ffff",
    "<pad <eos < bos> <|endoftext|> <unk/> <0x41> <|sentencepiece-unk|> [PAD]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "    def f(x):\n        return x  # done\n\n\n",
    "".join(chr(i) for i in range(256)),
]


def made_up_stories(count: int = 600) -> list[str]:
    rng = random.Random(7)
    who = ["Mia", "Tom", "Lily", "Ben", "Sara", "Max", "the-fox", "mother", "grandpa", "Zoë"]
    did = ["found", "lost", "wanted", "carried", "painted", "followed", "shared", "watched", "opened", "remembered"]
    what = ["ball", "kite", "boat", "garden", "little-house", "rainbow", "blanket", "cookie", "drum", "lantern", "café"]
    how = ["slowly", "happily! again? in the morning", "under the old tree", "with 3 friends", "at 10:45."]
    stories = []
    for _ in range(count):
        lines = [f"{rng.choice(who)} {rng.choice(did)} the {rng.choice(what)} {rng.choice(how)}" for _ in range(6)]
        stories.append("Once upon a time, there was a day.\n\n" + "\n".join(lines) + '\n"The end," said Mia.  漢字')
    return stories


def make_config(kind: str = "BPE", **values: object) -> TokenizerConfig:
    sizes = {"BPE": 400, "sentencepiece": 512, "char": None, "gpt2": None}
    settings = {"name": "t", "type": kind, "vocab_size": sizes[kind], "dataset_config": "d", **values}
    return TokenizerConfig.from_dict(settings)


def gpt2_style(bpe: BPETokenizer, **extra: str) -> GPT2Tokenizer:
    """A small table in GPT-2's byte order: the published one cannot be part of the tests."""
    return GPT2Tokenizer(
        [*(bytes([byte]) for byte in GPT2_BYTES), *bpe.base[256:]],
        {"eos": "<|endoftext|>", "bos": "<|endoftext|>", **extra},
    )
