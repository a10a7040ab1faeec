"""Write a story with a checkpoint and a tokenizer given one by one."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("generate")
