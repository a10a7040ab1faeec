"""Shared by all web pages: formatting of text and numbers, colors, and tokens with their surprise."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def shared_style() -> str:
    """Return the CSS rules shared by all pages."""
    return (_FOLDER / "page.css").read_text("utf-8")


def shared_script() -> str:
    """Return the script that defines ``surprise``; it must precede the page's own script."""
    return (_FOLDER / "surprise.js").read_text("utf-8")
