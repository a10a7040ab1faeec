"""Put a checkpoint and a tokenizer, given one by one, on the Hugging Face Hub."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("upload-checkpoint")
