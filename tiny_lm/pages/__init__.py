"""What the pages in a browser share: how text and numbers are written, colours, and tokens that explain themselves."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def shared_style() -> str:
    """Return the rules that all pages begin their style with."""
    return (_FOLDER / "page.css").read_text("utf-8")


def shared_script() -> str:
    """Return the script that defines ``surprise``, before a page's own."""
    return (_FOLDER / "surprise.js").read_text("utf-8")
