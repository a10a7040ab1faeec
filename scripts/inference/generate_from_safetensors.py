"""Generate text with a model in Hugging Face's layout; ``--checkpoint`` is its folder or safetensors file."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("generate-from-checkpoint")
