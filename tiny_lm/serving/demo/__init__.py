"""The demo: a page in the browser on which models write stories, without requests to other machines."""

from tiny_lm.serving.demo.server import serve_demo

__all__ = ["serve_demo"]
