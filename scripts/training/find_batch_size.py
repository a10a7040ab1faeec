"""Find the largest micro-batch that fits: `tiny-lm find-batch-size` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("find-batch-size")
