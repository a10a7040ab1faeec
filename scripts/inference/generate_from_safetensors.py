"""Write a story with a model in Hugging Face's layout: ``--checkpoint`` names its folder or its safetensors file."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("generate")
