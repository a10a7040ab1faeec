"""Train a model of any family: `tiny-lm train` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("train")
