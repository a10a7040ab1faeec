"""Fetch or cache a raw data set: `tiny-lm data download` under its documented path."""

from tiny_lm.cli import main

if __name__ == "__main__":
    main("data", "download")
