"""Write a Hugging Face folder from a checkpoint and a tokenizer given one by one."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("convert-to-huggingface")
