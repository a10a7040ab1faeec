"""The Hub source: our code and the `datasets` library as they are, against a small Hub of our own on this machine."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow
import pyarrow.parquet
import pytest
from small_hub import HubHandler, address_of_nobody, hub_environment, serving

COMMIT = "a" * 40
TEXTS = [f"story {number}\n" for number in range(150)]


def parquet(texts: list[str | None]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file)
    return file.getvalue()


FILES = {
    "data/train-00000-of-00001.parquet": parquet([*TEXTS, None, "  "]),
    "data/test-00000-of-00001.parquet": parquet(["held out"]),
}
REFUSED = {"gated": (403, "GatedRepo"), "busy": (429, None), "broken": (503, None)}


class SmallHub(HubHandler):
    """Answers for the data set some/stories as the Hub does; knows a few that it refuses, and no others."""

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:1] == ["api"]:
            self.answer_about(parts[2:])
        elif parts[:4] == ["datasets", "some", "stories", "resolve"]:
            self.answer_file("/".join(parts[5:]))
        else:
            status, code = REFUSED.get(parts[1], (401, "RepoNotFound"))
            self.answer(status, X_Error_Code=code)

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def do_POST(self) -> None:
        """Describe the files that a body names, as older versions of the library ask."""
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = [{"type": "file", "oid": "b", "path": name, "size": len(data)} for name, data in FILES.items()]
        self.answer(200, json.dumps([file for file in found if quote(str(file["path"]), "") in asked]).encode())

    def answer_about(self, parts: list[str]) -> None:
        if parts[:1] == ["gated"]:  # what is gated are the files
            self.answer(200, json.dumps({"id": "gated/set", "sha": COMMIT, "gated": "auto"}).encode())
        elif parts[:2] != ["some", "stories"]:
            status, code = REFUSED.get(parts[0] if parts else "", (401, "RepoNotFound"))
            self.answer(status, X_Error_Code=code)
        elif parts[2:3] == ["tree"]:
            inside = "/".join(parts[4:])
            tree = [{"type": "file", "oid": "b", "path": name, "size": len(data)} for name, data in FILES.items()]
            self.answer(
                200, json.dumps(tree if inside else [{"type": "directory", "oid": "c", "path": "data"}]).encode()
            )
        elif parts[2:] in ([], ["revision", "main"], ["revision", COMMIT]):
            self.answer(200, json.dumps({"id": "some/stories", "sha": COMMIT}).encode())
        else:
            self.answer(404, X_Error_Code="RevisionNotFound")

    def answer_file(self, name: str) -> None:
        if name not in FILES:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        data, wanted = FILES[name], self.headers["Range"]
        tag = f'"{len(data)}"'  # files of one tag are one file to the library
        if wanted is None:
            self.answer(200, data, X_Repo_Commit=COMMIT, ETag=tag)
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        stop = min(int(end) + 1 if end else len(data), len(data))
        place = f"bytes {start}-{stop - 1}/{len(data)}"
        self.answer(206, data[int(start) : stop], X_Repo_Commit=COMMIT, ETag=tag, Content_Range=place)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serving(SmallHub) as address:
        yield address


@pytest.fixture(scope="module")
def nowhere() -> str:
    return address_of_nobody()


# It leaves without Python's own end: a thread of pyarrow that still closes a streamed file would then be killed in the
# middle of C++, and abort the process after all is read (huggingface_hub issue 4178).
ASK = """
import json, os, sys
from tiny_lm.dataset import DatasetConfig, download, iter_documents
from tiny_lm.errors import UserError
for case in json.loads(sys.argv[1]):
    counting = case.pop("download", False)
    split = case.pop("split", "train")
    config = DatasetConfig.from_dict({"splits": {"train": "train"}, **case})
    try:
        answer = download(config) if counting else list(iter_documents(config, split, val_split=0))
    except UserError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
os._exit(0)
"""


def ask(endpoint: str, home: Path, *cases: dict, **environment: str) -> list:
    """Read each case in one new process."""
    variables = hub_environment(endpoint, home, **environment)
    command = [sys.executable, "-c", ASK, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


STREAMED = {"name": "some/stories"}


def test_streamed_downloaded_and_then_without_a_network(hub: str, nowhere: str, tmp_path: Path):
    both = {**STREAMED, "splits": {"train": "train", "validation": "test"}}
    cases = [STREAMED, {**STREAMED, "revision": COMMIT}, {**both, "split": "validation"}]
    assert ask(hub, tmp_path, *cases) == [TEXTS, TEXTS, ["held out"]]
    assert not list(tmp_path.rglob("*.arrow"))
    assert ask(hub, tmp_path, {**both, "download": True}, {**STREAMED, "streaming": False}) == [
        {"train": 152, "validation": 1},
        TEXTS,
    ]
    # The copy is now used wherever it is the same commit, and where the Hub cannot be reached.
    assert len(list(tmp_path.rglob("*.arrow"))) == 2
    pinned, other = {**STREAMED, "revision": COMMIT}, {**STREAMED, "revision": "v2"}
    *copies, unknown = ask(nowhere, tmp_path, STREAMED, both, {**STREAMED, "streaming": False}, pinned, other)
    assert copies == [TEXTS] * 4
    assert "cannot be reached" in unknown
    assert ask(nowhere, tmp_path, STREAMED, HF_HUB_OFFLINE="1") == [TEXTS]


def test_what_the_hub_refuses_is_one_line(hub: str, tmp_path: Path):
    cases = {
        "no such data set on the Hub": {"name": "no/such"},
        "not a valid data set name": {"name": "a/b/c"},
        "has no revision 'v9'": {**STREAMED, "revision": "v9"},
        "gated dataset": {"name": "gated/set"},
        "429": {"name": "busy/set"},
        "503": {"name": "broken/set"},
        "'nope' not found. Available: ['default']": {**STREAMED, "config_name": "nope"},
        "Available splits: ['train', 'test']": {**STREAMED, "splits": {"train": "nope"}},
        "should be one of": {**STREAMED, "splits": {"train": "nope"}, "streaming": False},
        "has no field 'txt', set text_field; did you mean 'text'?": {**STREAMED, "text_field": "txt"},
        "the field 'id' is not text but 0": {**STREAMED, "text_field": "id"},
    }
    for (message, case), answer in zip(cases.items(), ask(hub, tmp_path, *cases.values()), strict=True):
        assert isinstance(answer, str), case
        assert message.lower() in answer.lower()
        assert "\n" not in answer
        assert case["name"] in answer


def test_without_a_network_one_line_within_seconds_names_the_other_sources(nowhere: str, tmp_path: Path):
    start = time.monotonic()
    answers = ask(nowhere, tmp_path, STREAMED, {**STREAMED, "streaming": False}, {**STREAMED, "download": True})
    assert time.monotonic() - start < 15  # nearly all of it is the import of the library
    for answer in answers:
        assert answer.startswith("some/stories: the Hugging Face Hub cannot be reached")
        assert "`source: local`" in answer
        assert "`source: stories`" in answer


def test_a_folder_laid_out_like_a_repository(nowhere: str, tmp_path: Path):
    for name, data in FILES.items():
        file = tmp_path / "repo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    case = {"name": str(tmp_path / "repo")}
    (tmp_path / "large" / "data").mkdir(parents=True)
    large = tmp_path / "large" / "data" / "train-00000-of-00001.parquet"
    large.write_bytes(parquet(["small", "é" * (2**25 + 1)]))
    large_case = {"name": str(large.parent.parent)}
    streamed, copied, *refused = ask(
        nowhere, tmp_path, case, {**case, "streaming": False}, large_case, {**large_case, "streaming": False}
    )
    assert (streamed, copied) == (TEXTS, TEXTS)
    for answer in refused:
        assert "the document in row 1 is larger than 64 MiB" in answer
