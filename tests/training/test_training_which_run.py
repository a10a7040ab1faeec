"""Which run `--resume auto` goes on with."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.runs import Run, find_newest_run
from tiny_lm.training.auto_resume import config_origin, describe_near_misses, find_run

NAMES = ["model", "training", "data"]


class Project:
    """A working directory with config files and runs that were begun from them."""

    def __init__(self, stream_folder: Path) -> None:
        paths = {f"{split}_path": str(stream_folder / f"{split}.bin") for split in ("train", "val")}
        self.model = model()
        self.training = training()
        self.data = BinDataConfig(**paths, block_size=32, batch_size=4)

    def origins(self, folder: str) -> list[str]:
        for name in NAMES:
            getattr(self, name).save(Path(folder) / f"{name}.yaml")
        return [config_origin(name, f"{folder}/{name}.yaml") for name in NAMES]

    def begin(self, name: str, *, folder: str = "exp", age: float = 0, saved: bool = True, **values: Any) -> Run:
        run = Run(Path("runs") / name)
        for section in NAMES:
            getattr(self, section).save(run.configs / f"{section}.yaml")
        run.update_metadata(**{"configs": NAMES, "config_files": self.origins(folder), "name": name, **values})
        if saved:
            run.checkpoints.mkdir()
            run.step_checkpoint(4).touch()
        for path in (run.metadata_file, *run.folder.glob("checkpoints")):
            os.utime(path, (1e9 - age, 1e9 - age))
        return run

    def find(self, folder: str = "exp", **values: Any) -> Run | None:
        return find_run((self.model, replace(self.training, **values), self.data), NAMES, self.origins(folder))


@pytest.fixture
def project(tmp_path: Path, stream_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(stream_folder)


def test_a_run_is_known_by_its_config_files_and_not_their_names(project: Project) -> None:
    assert project.find() is None
    run = project.begin("a")
    assert project.find() == run
    assert project.find("other") is None


def test_what_is_learned_must_be_the_same_and_the_rest_may_change(project: Project) -> None:
    run = project.begin("a")
    assert project.find(max_steps=99, save_every_n_steps=7, devices="auto", precision="bf16-mixed") == run
    changes: list[dict[str, Any]] = [{"learning_rate": 0.1}, {"seed": 5}, {"optimizer": "muon"}, {"weight_decay": 0.5}]
    for change in changes:
        assert project.find(**change) is None
    configs = (project.model, replace(project.training, learning_rate=0.1), project.data)
    why = describe_near_misses(configs, NAMES, project.origins("exp"))
    assert why is not None
    assert "training.learning_rate 0.003 and not 0.1" in why
    assert "--resume runs/a" in why


def test_another_model_or_another_text_is_another_run(project: Project) -> None:
    project.begin("a", train_tokens=3)
    assert project.find() is None  # the stream has another number of tokens now
    project.begin("b")
    project.model = model("llama3")
    assert project.find() is None


def test_the_hint_to_resume_another_run_can_be_pasted(project: Project) -> None:
    project.begin("my run")
    configs = (model("llama3"), project.training, project.data)
    assert str(describe_near_misses(configs, NAMES, project.origins("exp"))).endswith("--resume 'runs/my run'")


def test_a_copied_folder_is_not_the_run_while_the_original_is_there(project: Project) -> None:
    run = project.begin("a", age=9)
    shutil.copytree(run.folder, "runs/b")
    os.utime("runs/b/checkpoints")  # the newer one
    assert project.find() == run
    shutil.rmtree(run.folder)  # now it is the run under another name
    assert project.find() == Run(Path("runs/b"))


def test_where_several_fit_they_are_listed(project: Project) -> None:
    project.begin("a", status="stopped")
    project.begin("b", status="finished")
    with pytest.raises(UserError, match="2 runs match") as caught:
        project.find()
    for part in ("runs/a (step 4, stopped)", "runs/b (step 4, finished)", "--resume runs/b"):
        assert part in str(caught.value)


def test_a_run_without_a_checkpoint_is_better_than_none_and_no_better_than_any_other(project: Project) -> None:
    project.begin("unsaved-before", age=2, saved=False)
    newest = project.begin("unsaved", age=1, saved=False)
    foreign = Run(Path("runs") / "foreign")
    foreign.folder.mkdir()
    foreign.metadata_file.write_text("[")
    assert project.find() == newest
    saved = project.begin("saved", age=3)
    assert project.find() == saved
    assert find_newest_run() == saved


def test_a_run_of_an_older_version_is_known_by_the_names_of_its_configs(project: Project) -> None:
    run = project.begin("a")
    record = run.read_metadata()
    del record["config_files"], record["name"]
    run.metadata_file.unlink()
    run.update_metadata(**record)
    assert project.find("anywhere") == run


def test_shipped_configs_have_one_origin_wherever_they_are_installed(project: Project) -> None:
    assert config_origin("training", "turbo") == "shipped:training/turbo.yaml"
    assert config_origin("models", "gpt2-8k-2l-speed") == "shipped:models/gpt2-8k-2l-speed.yaml"
