"""How a local corpus was read: separators, encodings, skipped files."""

from dataclasses import dataclass, field
from pathlib import Path

from tiny_lm.dataset.config import BLANK_LINE
from tiny_lm.dataset.find_files import describe_skipped


@dataclass
class ReadingNotes:
    """Collected while files are read.

    Attributes:
        files: files read so far.
        skipped: files found but not read.
        encodings: names of the encodings.
        separators: document separators of .txt files.
        inside_lines: separators that are not on their own line.
    """

    files: int = 0
    skipped: list[Path] = field(default_factory=list)
    encodings: set[str] = field(default_factory=set)
    separators: set[str] = field(default_factory=set)
    inside_lines: int = 0

    def count_separator(self, separator: str, *, is_missing: bool) -> None:
        """Record the separator of one file."""
        if is_missing:
            self.separators.add(f"by blank lines, since {separator} does not occur")
        else:
            self.separators.add("by blank lines" if separator == BLANK_LINE else f"by {separator}")

    def describe(self) -> str:
        """Return a one-line summary."""
        facts = [f"{self.files:,} {'file' if self.files == 1 else 'files'}"]
        facts += sorted(self.encodings)
        if self.separators:
            facts.append(f"divided {' and '.join(sorted(self.separators))}")
        if self.inside_lines:
            facts.append(f"{self.inside_lines:,} of the separators inside a line, where they divide too")
        if self.skipped:
            facts.append(f"skipped {describe_skipped(self.skipped)}")
        return ", ".join(facts)
