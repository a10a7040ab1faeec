"""``report.html``: one self-contained page about a run and its model."""

from tiny_lm.evaluation.report.page import write_report

__all__ = ["write_report"]
