"""The package is written in the field's English: a few phrases that never are stay out of it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tiny_lm"
TYPES = {".py", ".html", ".js", ".css", ".md"}
PHRASES = re.compile(
    r"\b(told|tell_\w+|tells?|anew|mend(s|ed)?|gone on|go(es)? on with|so many|is no|stands? for|at hand|in vain)\b",
    re.IGNORECASE,
)
STORIES = ("dataset/story_parts/", "evaluation/prompts.txt")
"""Material of stories, in which people may tell, mend and stand as they like."""

ALLOWED = {
    ("dataset/parquet.py", "tell"): "a file's method",
    ("serving/demo/page.py", "tell"): "the name of the demo's event, which clients call",
}
"""(file, phrase): why it is right there."""


def test_package_speaks_the_language_of_the_field() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE).as_posix()
        if path.suffix not in TYPES or name.startswith(STORIES):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in PHRASES.finditer(line):
                found.setdefault((name, match[0].lower()), []).append(number)
    assert {key: lines for key, lines in found.items() if key not in ALLOWED} == {}
    assert ALLOWED.keys() <= found.keys(), "no longer needed"
    assert sum(map(len, found.values())) <= 20
