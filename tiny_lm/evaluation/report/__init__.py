"""``report.html``: one self-contained page that shows what a run did and what its model became."""

from tiny_lm.evaluation.report.page import write_report

__all__ = ["write_report"]
