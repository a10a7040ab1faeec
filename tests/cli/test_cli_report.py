import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tiny_lm.cli.report import write_report_beside
from tiny_lm.runs import Run


def test_a_report_is_written_again_and_named(workplace: Path, cli: Callable[..., object]) -> None:
    folder = workplace / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "stopped"}))
    result = cli("report", "runs/x")
    assert (result.code, result.stdout, result.stderr) == (0, "runs/x/report.html\n", "")
    assert "stopped" in (folder / "report.html").read_text()


def test_a_report_of_no_run_is_one_line(workplace: Path, cli: Callable[..., object]) -> None:
    result = cli("report", "runs/y")
    assert (result.code, result.stderr) == (2, "error: runs/y: no such run folder\n")
    (workplace / "metrics.jsonl").touch()
    result = cli("report", "metrics.jsonl")
    assert (result.code, result.stderr) == (2, "error: metrics.jsonl: is a file, not a run folder\n")


@pytest.mark.parametrize("content", ["[]", "{", '{"configs": {"a": 1}, "metrics": {"val_loss": "\\ud800"}}'])
def test_a_failed_report_is_a_warning(workplace: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (workplace / "run.json").write_text(content)
    write_report_beside(Run(workplace))
    lines = capsys.readouterr().err.splitlines()
    written = (workplace / "report.html").exists()
    assert len(lines) == (0 if written else 1)
    assert written or lines[0].startswith("warning: the report could not be written: ")


def test_a_fault_of_the_page_does_not_stop_a_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_run: Run, _settings: Sequence[str]) -> Path:
        raise ZeroDivisionError("on\nthe page")

    monkeypatch.setattr("tiny_lm.evaluation.report.write_report", fail)
    write_report_beside(Run(workplace))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the report could not be written: ZeroDivisionError: on the page (")
