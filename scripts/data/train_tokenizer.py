"""Train a tokenizer: `tiny-lm tokenizer train` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("tokenizer", "train")
