"""Open the demo page with the newest run, on port 7860."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("demo")
