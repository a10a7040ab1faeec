"""Runs pushed by the real huggingface_hub to a Hub of our own, and read back; what is refused, here and there."""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from receiving_hub import ReceivingHub, write_files
from safetensors.torch import load_file, save_file
from small_hub import address_of_nobody, hub_environment, serving
from tiny_exports import TrainedRun

from tiny_lm.errors import UserError
from tiny_lm.export.hub import Target, allowed_files, check_license
from tiny_lm.export.importing import import_model
from tiny_lm.export.source import load_source
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.model.huggingface_weights import to_huggingface_state

ROOT = Path(__file__).parents[2]
WRITER = {"HF_TOKEN": "hf_writer"}


@pytest.fixture
def hub() -> type[ReceivingHub]:
    return ReceivingHub.begin()


@pytest.fixture
def address(hub: type[ReceivingHub]) -> Iterator[str]:
    with serving(hub) as address:
        yield address


def run(words: list[Any], endpoint: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(endpoint, home, **variables)
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
    )


MAIN = ["-c", "from tiny_lm.cli import main; main()"]


def test_what_was_pushed_is_the_model(
    hub: type[ReceivingHub], address: str, trained_run: TrainedRun, tmp_path: Path
) -> None:
    trained = trained_run("qwen3")
    source = load_source(trained.folder)
    command = [*MAIN, "push", trained.folder, "--repo-id", "me/tiny", "--private", "--license", "cc-by-4.0"]
    told = run([*command, "--dry-run"], address, tmp_path / "home")
    assert told.returncode == 0, told.stderr
    assert hub.requests == []
    assert "to " + address + "/me/tiny (only you may see it)" in told.stderr
    done = run(command, address, tmp_path / "home", **WRITER)
    assert done.returncode == 0, done.stderr
    *listed, commit = done.stdout.splitlines()
    assert listed == told.stdout.splitlines()
    assert commit == f"{address}/me/tiny/commit/{'b' * 40}"
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert repository.commits == ["qwen3-BPE, step 60, as tiny-lm 0.1.0 exports it"]
    assert sorted(f"{name}  {len(data):,} bytes" for name, data in repository.files.items()) == listed
    # no state of an optimizer, no path of this machine
    received = write_files(repository, tmp_path / "received")
    expected = to_huggingface_state(source.config, source.model.state_dict())
    assert load_file(received / "model.safetensors").keys() == expected.keys()
    assert not [name for name, data in repository.files.items() if str(trained.folder.parent).encode() in data]
    # the model, read back
    back = import_model(received, tmp_path / "back")
    ids = torch.tensor([source.validation.ids[:90]])
    with torch.no_grad():
        assert torch.equal(load_checkpoint_model(back.last_checkpoint).model(ids), source.model(ids))
    assert load_source(back.folder).tokenizer.hash == source.tokenizer.hash
    # the card
    front = yaml.safe_load((received / "README.md").read_text().split("---")[1])
    assert (front["license"], front["tags"]) == ("cc-by-4.0", ["tiny-lm", "text-generation", "qwen3"])
    ((result,),) = [index["results"] for index in front["model-index"]]
    event = json.loads(trained.metrics.read_text().splitlines()[-1])
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert found["validation loss"] == event["val_loss"] == source.scores["val_loss"]
    assert found["validation bits per byte"] == event["val_bpb"]
    assert 'model="me/tiny"' in (received / "README.md").read_text()


def test_the_documented_script_in_half_precision(
    hub: type[ReceivingHub], address: str, trained_run: TrainedRun, tmp_path: Path
) -> None:
    trained = trained_run("gpt2")
    words = [
        ROOT / "scripts" / "hf_hub" / "upload_gpt2.py", "--repo-id", "me/open",
        "--checkpoint", trained.last_checkpoint, "--model-config", trained.configs / "model.yaml",
        "--training-config", trained.configs / "training.yaml", "--tokenizer", trained.tokenizer / "tokenizer.pkl",
        "--tokenizer-config", "tinystories-8k", "--dtype", "bfloat16",
    ]  # fmt: skip
    done = run(words, address, tmp_path / "home", **WRITER, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    state = load_file(write_files(hub.repositories["me/open"], tmp_path / "received") / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert len(hub.repositories) == 1


@pytest.mark.llamacpp
def test_gguf_files_go_with_it(hub: type[ReceivingHub], address: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    command = [*MAIN, "push", trained_run("llama3").folder, "--repo-id", "me/tiny", "--gguf", "q8_0,Q4_K_M"]
    done = run(command, address, tmp_path / "home", **WRITER)
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/tiny"].files
    assert {name for name in files if "gguf" in name} == {
        "gguf-verification.json", "llama3-BPE-Q8_0.gguf", "llama3-BPE-Q4_K_M.gguf",
    }  # fmt: skip
    assert json.loads(files["gguf-verification.json"])["passed"] is True
    assert json.loads(files["verification.json"])["files"].keys() == {"model.safetensors"}


# --- what is not sent ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.mark.parametrize(
    "name", ["last.ckpt", "tokenizer.pkl", "pytorch_model.bin", "optimizer.pt", "model.onnx.data", ".env", "notes.md"]
)
def test_other_files_are_refused(name: str, folder: Path) -> None:
    assert [file.name for file in allowed_files(folder)] == ["README.md", "config.json", "model.safetensors"]
    (folder / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: not allowed on the Hub, only"):
        allowed_files(folder)


def test_a_pickle_under_another_name_is_refused(folder: Path) -> None:
    checkpoint = {"state_dict": {"x": torch.zeros(3)}, "optimizer_states": []}
    for name in ("model.safetensors", "model.gguf", "config.json", "tokenizer.model", "README.md"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        for write in (lambda file: torch.save(checkpoint, file), lambda file: file.write_bytes(pickle.dumps(["\0"]))):
            write(folder / name)
            with pytest.raises(UserError, match=f"{name}: its content does not match its name"):
                allowed_files(folder)
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)
    (folder / "more.json").write_bytes(pickle.dumps(["x"], protocol=0))  # which is text
    with pytest.raises(UserError, match=r"more\.json: its content does not match its name"):
        allowed_files(folder)
    (folder / "more.json").unlink()
    save_file({"x.exp_avg": torch.zeros(3)}, folder / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors: its content does not match its name"):
        allowed_files(folder)
    (folder / "state.safetensors").unlink()
    (folder / "more.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"more\.json: not allowed on the Hub"):
        allowed_files(folder)
    (folder / "more.json").unlink()
    (folder / "checkpoints.json").mkdir()
    with pytest.raises(UserError, match=r"checkpoints\.json: not allowed on the Hub"):
        allowed_files(folder)


@pytest.mark.parametrize("name", ["", "a/b/c", "me/", "/x", "me/-x", "me/x..y", "me/x y", "me/x.git", "me/" + "x" * 97])
def test_a_name_that_the_hub_does_not_have(name: str) -> None:
    with pytest.raises(UserError, match="not a valid name on the Hub"):
        Target(name)


def test_a_name_without_its_owner_and_a_license() -> None:
    assert Target("me-2/x.y_z-1").repo_id == "me-2/x.y_z-1"
    with pytest.raises(UserError, match="must include the owner, as in user/tiny"):
        Target("tiny")
    check_license("apache-2.0")
    with pytest.raises(UserError, match="--license MIT license: not a license identifier"):
        check_license("MIT license")


# --- what the Hub refuses --------------------------------------------------------------------------------------------

SEND = """
import json, sys
from pathlib import Path
from tiny_lm.errors import UserError
from tiny_lm.export.hub import Target, allowed_files, check_access, send
for repo_id, private in json.loads(sys.argv[2]):
    try:
        check_access(Target(repo_id, private))
        print(send(allowed_files(Path(sys.argv[1])), Target(repo_id, private), "message"))
    except UserError as error:
        print(error)
"""


def send(folder: Path, endpoint: str, *cases: tuple[str, bool], **variables: str) -> list[str]:
    """Send a folder to each repository, without an export, in one new process; return a line for each."""
    done = run(["-c", SEND, folder, json.dumps(cases)], endpoint, folder.parent / "home", **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stdout
    return lines


def test_what_the_hub_refuses_is_one_line(hub: type[ReceivingHub], address: str, folder: Path) -> None:
    twice = ("me/new", True)
    sent = send(folder, address, twice, twice, ("me/open", True), ("you/x", False), ("me/texts", False), **WRITER)
    assert sent[:2] == [f"{address}/me/new/commit/{'b' * 40}"] * 2
    assert sent[2].startswith("me/open: already exists and is public, which --private does not change")
    assert sent[3].startswith("you/x: no write permission; use a token with write access")
    assert sent[4].startswith("me/texts: the Hub has no model of this name; is it a data set or a Space?")
    assert hub.repositories["me/open"].files == {}
    assert len(hub.repositories["me/new"].commits) == 2
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    hub.refuses_objects = True
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    (bad_card,) = send(folder, address, ("me/new", True), **WRITER)
    assert "me/new: the Hub refused, and nothing was committed (Invalid metadata in README.md." in bad_card
    (folder / "README.md").write_text("# x\n")
    (too_large,) = send(folder, address, ("me/new", True), **WRITER)
    assert "'model.safetensors'" in too_large
    assert "File is larger than allowed" in too_large
    assert len(hub.repositories["me/new"].commits) == 2


def test_large_files_go_to_xet_where_the_hub_has_it(hub: type[ReceivingHub], address: str, folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    hub.xet = "full"
    (sent,) = send(folder, address, ("me/new", False), **WRITER)
    assert sent == f"{address}/me/new/commit/{'b' * 40}"
    digest = hashlib.sha256(weights).hexdigest()
    assert hub.repositories["me/new"].files["model.safetensors"] == f"xet {digest} {len(weights)}".encode()
    assert hub.repositories["me/new"].files["config.json"] == b"{}"
    assert not [request for request in hub.requests if "lfs" in request]
    hub.xet = "closed"
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    (refused,) = send(folder, address, ("me/new", False), **WRITER)
    assert refused.startswith("me/new: ")
    assert "set HF_HUB_DISABLE_XET=1 to send the files through Git LFS" in refused
    assert len(hub.repositories["me/new"].commits) == 1
    assert send(folder, address, ("me/new", False), **WRITER, HF_HUB_DISABLE_XET="1") == [sent]


def test_tokens(hub: type[ReceivingHub], address: str, folder: Path) -> None:
    case = ("me/new", False)
    assert send(folder, address, case) == [
        "me/new: no token for the Hub; log in with `hf auth login`, or set the variable HF_TOKEN"
    ]
    assert hub.requests == []
    (unknown,) = send(folder, address, case, HF_TOKEN="hf_other")
    assert unknown.startswith("me/new: the Hub rejected the token; log in again")
    (reader,) = send(folder, address, case, HF_TOKEN="hf_reader")
    assert reader.startswith("me/new: no write permission")
    assert "me/new" not in hub.repositories


def test_without_a_network(folder: Path) -> None:
    nowhere = address_of_nobody()
    (line,) = send(folder, nowhere, ("me/new", False), **WRITER)
    assert line.startswith(f"{nowhere}/me/new: the Hugging Face Hub cannot be reached; check the network")
    (line,) = send(folder, nowhere, ("me/new", False), **WRITER, HF_HUB_OFFLINE="1")
    assert line == "me/new: HF_HUB_OFFLINE is set, so nothing can be sent; unset it"
