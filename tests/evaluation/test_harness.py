"""lm-eval on a run folder and on its export: the figures are those of our own model, computed in the plainest way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_lm.errors import UserError
from tiny_lm.evaluation.harness import run_harness
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.source import load_source
from tiny_lm.inference import TextGenerator
from tiny_lm.runs import Run

TASKS = Path(__file__).parent.parent / "fixtures" / "harness_tasks"


NAMES = ["tiny_endings", "tiny_perplexity", "tiny_continue"]


@pytest.fixture(scope="module")
def at_the_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.chdir(TASKS)  # the tasks name their questions relative to here
        yield


@pytest.fixture(scope="module")
def results(trained: Run, at_the_tasks: None) -> dict[str, Any]:
    return run_harness(trained.folder, NAMES, include_path=TASKS, batch_size=3)


@pytest.fixture(scope="module")
def exported(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "huggingface"
    export_huggingface(load_source(trained.folder), folder)
    return folder


def log_likelihood(generator: TextGenerator, ids: list[int], begin: int) -> float:
    """The log-probability of ids[begin:], each token with up to 32 tokens before it, one by one."""
    total = 0.0
    for place in range(begin, len(ids)):
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids[max(place - 32, 0) : place]]))[0, -1]
        total += float(logits.log_softmax(dim=-1)[ids[place]])
    return total


def test_endings_have_the_log_likelihoods_of_our_own_model(results: dict[str, Any], trained: Run) -> None:
    generator = TextGenerator.from_run(trained.folder)
    right = 0
    for sample in results["samples"]["tiny_endings"]:
        question = sample["doc"]
        expected = []
        for ending in question["endings"]:
            given = generator.tokenizer.encode(question["beginning"], bos=True)
            ids = generator.tokenizer.encode(f"{question['beginning']} {ending}", bos=True)
            assert ids[: len(given)] == given
            expected.append(log_likelihood(generator, ids, len(given)))
        found = [response[0][0] for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        right += expected[question["right"]] == max(expected)
    assert results["results"]["tiny_endings"]["acc,none"] == right / 4


def test_running_text_counts_each_token_once(results: dict[str, Any], trained: Run) -> None:
    generator = TextGenerator.from_run(trained.folder)
    for sample in results["samples"]["tiny_perplexity"]:
        text = f"{sample['doc']['beginning']} {sample['doc']['endings'][sample['doc']['right']]}"
        ids = generator.tokenizer.encode(text, bos=True)
        assert sample["resps"][0][0] == pytest.approx(log_likelihood(generator, ids, 1), abs=1e-4)


def test_what_is_written_is_the_greedy_continuation_up_to_the_stop(results: dict[str, Any], trained: Run) -> None:
    generator = TextGenerator.from_run(trained.folder)
    for sample in results["samples"]["tiny_continue"]:
        prompt = sample["doc"]["beginning"]
        greedy = generator.generate(prompt, 12, temperature=0).removeprefix(prompt)
        assert sample["resps"][0][0] == greedy.partition(".")[0]


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each question: a log-likelihood and whether it is greedy, or a text."""
    return [response for sample in results["samples"][task] for response in sample["resps"]]


def test_the_export_has_the_same_figures_in_the_model_of_lm_eval(results: dict[str, Any], exported: Path) -> None:
    """With its own tokenizer, batches and windows, over transformers. The tolerance is that of the export's checks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def evaluate(task: str, **model_args: Any) -> dict[str, Any]:
        found: dict[str, Any] = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(exported), "dtype": "float32", **model_args},
            tasks=[task],
            device="cpu",
            batch_size=3,
            task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        )
        return found

    # Running text gets a bos token from lm-eval besides the tokenizer's own, which must be turned off for it.
    for task, model_args in (("tiny_endings", {}), ("tiny_perplexity", {"add_bos_token": False})):
        found = evaluate(task, **model_args)
        for theirs, ours in zip(answers(found, task), answers(results, task), strict=True):
            assert theirs[0] == pytest.approx(ours[0], abs=1e-4)
        for metric, value in results["results"][task].items():
            if metric.endswith(",none") and isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, abs=1e-4), metric
    found = evaluate("tiny_continue")
    assert answers(found, "tiny_continue") == answers(results, "tiny_continue")


def test_our_model_reads_the_export_too(results: dict[str, Any], exported: Path, at_the_tasks: None) -> None:
    found = run_harness(exported, ["tiny_endings"], include_path=TASKS, batch_size=3)
    assert answers(found, "tiny_endings") == answers(results, "tiny_endings")


def test_a_long_text_is_scored_in_windows(trained: Run, stories: list[str]) -> None:
    """As the harness defines it: windows as long as the context, the last one with all the context it can have."""
    from lm_eval.api.instance import Instance

    from tiny_lm.evaluation.harness_model import HarnessModel

    model = HarnessModel(str(trained.folder))
    ids = model.generator.tokenizer.encode(stories[290], bos=True)
    request = Instance("loglikelihood_rolling", {}, (stories[290],), 0)
    with torch.no_grad():
        expected, begin = 0.0, 1
        while begin < len(ids):
            end = min(begin + 32, len(ids))
            window = ids[max(end - 33, 0) : end]
            scores = model.generator.model(torch.tensor([window[:-1]]))[0].log_softmax(dim=-1)
            for place in range(begin, end):
                expected += float(scores[place - end, ids[place]])
            begin = end
    assert len(ids) > 100
    assert model.loglikelihood_rolling([request]) == [pytest.approx(expected, abs=1e-3)]


def test_bad_names_are_told_in_one_line(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--tasks tiny_ending: no such task; did you mean 'tiny_endings'"):
        run_harness(trained.folder, ["tiny_ending"], include_path=TASKS)
    with pytest.raises(UserError, match="no such folder"):
        run_harness(trained.folder, ["tiny_endings"], include_path=tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--tasks tiny_endings: their questions could not be read \(.*endings.jsonl"):
        run_harness(trained.folder, ["tiny_endings"], include_path=TASKS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tiny-lm\[eval\]'"):
        run_harness(trained.folder, ["tiny_endings"])
