"""Open the page on which the newest run tells stories, on port 7860."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("demo")
