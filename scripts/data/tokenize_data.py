"""Turn a corpus into token streams: `tiny-lm tokenize` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("tokenize")
