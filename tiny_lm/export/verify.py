"""Verify that an export is the same model: token ids, log-probabilities, and generated text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_lm import __version__
from tiny_lm.console import make_console
from tiny_lm.errors import UserError
from tiny_lm.export.source import ExportSource
from tiny_lm.files import write_json

REPORT_FILE = "verification.json"

PROMPTS = ("Once upon a time", "One day, a girl named Lily", "The little dog was sad because")
GREEDY_TOKENS = 64
SEQUENCES = 4
PERPLEXITY_SEQUENCES = 16

_CHARACTERS = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x110000)) if i < 0x180 or i % 1009 == 0]
HARD_STRINGS: tuple[str, ...] = (
    "",
    *(f"a{character}b" for character in _CHARACTERS[:256]),  # every byte below 0x80, and two-byte characters
    "".join(_CHARACTERS),  # leading and following bytes of every kind
    " ",
    "  two  three   four    ",
    "\n",
    "\n\n\n",
    "line\nline\n\nline\r\nline \n \n\t end\n ",
    "tabs\tand\t\ttabs",
    " " * 40 + "x" + " " * 7,
    "it's I'LL we'Re they've 'twas don''t you'd o'clock",
    "1 12 123 1234 12345 1234567890 3.14 1,000,000 12:45 2nd ½ Ⅷ ٣٤٥",
    "!?... --- (a) [b] {c} \"d\" 'e' a.b,c;d:e/f\\g|h <i> #j @k",
    "😀 👨‍👩‍👧‍👦 🇯🇵 ✌🏽 e\u0301 ñ ß ﬁ naïve Zoë",
    "漢字かな交じり文、한국어 العربية עברית हिन्दी ไทย Ελληνικά кириллица",
    "\u200b \u2028 \u3000 \ufeff \ufffd \ue000",
    "<pad <eos < bos> <|endoftext <unk/> <0x41> [PAD] <s </s [INST",
    "ab" * 200,
    "    def f(x):\n        return x  # done\n\n\n",
    'Once upon a time, there was a little bear. "Hello!" he said.\n\nThe end.',
)
"""Texts on which tokenizers are known to differ."""


class Engine(Protocol):
    """A program that runs the exported model."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Encode text without adding or parsing special tokens."""

    def encode_document_start(self, text: str) -> list[int]:
        """Encode text with the special tokens that the program adds by default."""

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Return the log-probabilities of the next token after each of ``ids``: float32 [T, V]."""

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Decode greedily after ``ids``: up to ``count`` tokens, without a final eos."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was compared.
        value: the result as a number: differing texts, a difference, a share of equal tokens, a perplexity.
        result: the result in words.
        limit: the allowed result; empty if the line is only informative.
        passed: whether the result is within the limit.
    """

    name: str
    value: float
    result: str
    limit: str
    passed: bool


class OwnEngine:
    """Our own model without a cache: one full forward pass per token."""

    name = f"tiny-lm {__version__}"

    def __init__(self, source: ExportSource) -> None:
        self._model, self._tokenizer = source.model, source.tokenizer
        self._suppressed = suppressed_tokens(source)

    def encode(self, text: str) -> list[int]:
        """Encode with our tokenizer."""
        return self._tokenizer.encode(text)

    def encode_document_start(self, text: str) -> list[int]:
        """Encode text as the beginning of a training document."""
        return self._tokenizer.encode(text, bos=True)

    @torch.no_grad()
    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Run one forward pass over all ids."""
        return F.log_softmax(self._model(torch.tensor([list(ids)]))[0].float(), dim=-1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Decode greedily among the tokens that our generator may produce."""
        return greedy_decode(self, ids, count, suppressed=self._suppressed, eos_id=self._tokenizer.eos_id)


def suppressed_tokens(source: ExportSource) -> list[int]:
    """Return the ids that our generator never produces: control tokens except eos, and unused ids."""
    tokenizer = source.tokenizer
    control = {token.id for token in tokenizer.specials if token.control} - {tokenizer.eos_id}
    return sorted(control | set(range(tokenizer.vocab_size, source.config.vocab_size)))


def greedy_decode(
    engine: Engine, ids: Sequence[int], count: int, *, suppressed: Sequence[int], eos_id: int
) -> list[int]:
    """Append the likeliest token to ``ids`` until eos."""
    text = list(ids)
    for _ in range(count):
        last = engine.log_probabilities(text)[-1]
        last[list(suppressed)] = float("-inf")
        token = int(last.argmax())
        if token == eos_id:
            break
        text.append(token)
    return text[len(ids) :]


# --- the checks ------------------------------------------------------------------------------------------------------


def check_tokens(source: ExportSource, own: Engine, engine: Engine) -> list[Check]:
    """Compare token ids on hard strings and validation text, and the special tokens at the start of a document."""
    documents = [source.tokenizer.decode(ids) for ids in split_documents(source)]
    texts = {"hard strings": list(HARD_STRINGS), source.validation.origin: documents}
    checks = []
    for name, samples in texts.items():
        wrong = [text for text in samples if engine.encode(text) != own.encode(text)]
        result = f"{len(wrong)} of {len(samples)} texts differ"
        if wrong:
            result += f", such as {min(wrong, key=len)[:40]!r}"
        checks.append(Check(f"token ids: {name}", len(wrong), result, "0 differ", not wrong))
    begun = [engine.encode_document_start(prompt) for prompt in PROMPTS]
    expected = [own.encode_document_start(prompt) for prompt in PROMPTS]
    first = next((token for token in source.tokenizer.specials if begun[0][:1] == [token.id]), None)
    shown = f"begins with {first.text!r}" if first else "no special token is added"
    wrong_begun = sum(theirs != ours for theirs, ours in zip(begun, expected, strict=True))
    checks.append(Check("beginning of a text", wrong_begun, shown, "as in training", wrong_begun == 0))
    return checks


def check_greedy(source: ExportSource, own: Engine, engine: Engine, tolerance: float) -> Check:
    """Compare greedy completions.

    If the two likeliest tokens differ by less than twice ``tolerance``, in nats, either is right: decoding then
    continues with ours, and the result counts a tie.
    """
    same, compared, ties = 0, 0, 0
    for prompt in PROMPTS:
        begin = own.encode_document_start(prompt)[: max(1, source.config.context_length // 2)]
        count = min(GREEDY_TOKENS, source.config.context_length - len(begin))
        expected = [*own.greedy(begin, count), source.tokenizer.eos_id][:count]
        compared += len(expected)
        done = 0
        while done < len(expected):
            found = [*engine.greedy([*begin, *expected[:done]], count - done), source.tokenizer.eos_id][: count - done]
            pairs = zip(found, expected[done:], strict=False)
            equal = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), len(expected) - done)
            same, done = same + equal, done + equal
            if done == len(expected):
                break
            last = own.log_probabilities([*begin, *expected[:done]])[-1]
            if float(last[expected[done]] - last[found[equal]]) > 2 * tolerance:
                break
            same, done, ties = same + 1, done + 1, ties + 1
    result = f"{same} of {compared} tokens equal" + (f", {ties} of them a tie" if ties else "")
    name = f"greedy completion of {len(PROMPTS)} prompts"
    return Check(name, same / compared, result, "all equal", same == compared)


def perplexity(source: ExportSource, engine: Engine) -> float:
    """Return the perplexity over validation sequences, counting all tokens but the first of each."""
    nats, tokens = 0.0, 0
    for sequence in choose_sequences(source, PERPLEXITY_SEQUENCES):
        found = engine.log_probabilities(sequence)[:-1].gather(1, torch.tensor(sequence[1:])[:, None])
        nats, tokens = nats - float(found.double().sum()), tokens + len(sequence) - 1
    return math.exp(min(nats / tokens, 700.0))


def check_perplexity(source: ExportSource, original: float, engine: Engine, *, limit: float | None) -> Check:
    """Compare the perplexity with the original's; ``limit`` is how much worse it may become, as a share."""
    theirs = perplexity(source, engine)
    change = theirs / original - 1
    result = f"{theirs:.4f} where the original has {original:.4f} ({change:+.2%})"
    passed = math.isfinite(theirs) and (limit is None or change <= limit)
    return Check("perplexity", theirs, result, "" if limit is None else f"at most {limit:+.1%}", passed)


def split_documents(source: ExportSource) -> list[list[int]]:
    """Return the token ids of the validation documents, without special tokens."""
    ends = {source.tokenizer.bos_id, source.tokenizer.eos_id}
    documents: list[list[int]] = [[]]
    for token in source.validation.ids:
        if token in ends:
            documents.append([])
        else:
            documents[-1].append(token)
    return [document for document in documents[:-1] if document]  # the last one may end inside a character


def choose_sequences(source: ExportSource, count: int) -> list[list[int]]:
    """Return up to ``count`` sequences, spread evenly over the validation text."""
    ids, length = source.validation.ids, source.config.context_length
    starts = list(range(0, len(ids) - length + 1, length)) or [0]
    chosen = starts[:: max(1, len(starts) // count)][:count]
    return [ids[start : start + length] for start in chosen]


# --- the report ------------------------------------------------------------------------------------------------------


def write_report(folder: Path, source: ExportSource, form: str, files: dict[str, Any]) -> None:
    """Write ``verification.json`` beside an export.

    Args:
        folder: the export.
        source: what was exported.
        form: name of the format.
        files: metadata by file or folder name, with the checks under ``checks``.
    """
    plain = {name: {**facts, "checks": [asdict(check) for check in facts["checks"]]} for name, facts in files.items()}
    report = {
        "format": form,
        "source": source.name,
        "step": source.step,
        "tokenizer_hash": source.tokenizer.hash,
        "tiny_lm": __version__,
        "passed": all(check.passed for facts in files.values() for check in facts["checks"]),
        "files": plain,
    }
    write_json(folder / REPORT_FILE, report)


def show_table(title: str, checks: Iterable[Check]) -> None:
    """Print the checks to standard error."""
    from rich.table import Table

    table = Table("check", "result", "limit", "", title=title, title_justify="left")
    for check in checks:
        table.add_row(check.name, check.result, check.limit, "ok" if check.passed else "FAILED")
    make_console(soft_wrap=False).print(table)


def raise_on_failure(name: str, checks: Iterable[Check]) -> None:
    """Raise UserError, naming the first failed check, if any failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UserError(
            f"{name}: does not match the trained model ({failed[0].name}: {failed[0].result}); nothing was written"
        )
