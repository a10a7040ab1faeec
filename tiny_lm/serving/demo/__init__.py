"""A page in the browser on which models tell stories; it asks nothing of any other machine."""

from tiny_lm.serving.demo.server import serve_demo

__all__ = ["serve_demo"]
