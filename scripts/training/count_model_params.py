"""Count the parameters of a model: `tiny-lm params` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("params")
