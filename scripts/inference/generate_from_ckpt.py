"""Generate text with a checkpoint and a tokenizer."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("generate-from-checkpoint")
