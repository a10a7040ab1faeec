"""A Hub that takes models: the calls that huggingface_hub makes to create a repository and to commit files into it."""

import base64
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from small_hub import HubHandler

TOKENS = {"hf_writer": "me", "hf_reader": "me"}
LARGE = (".safetensors", ".gguf", ".model")  # as in the Hub's own .gitattributes


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class ReceivingHub(HubHandler):
    """Keeps what it is sent; a data set of the name me/texts is there, and a public model me/open."""

    repositories: dict[str, Repository]
    objects: dict[str, bytes]
    requests: list[str]
    refuses_objects: bool
    xet: Literal["none", "full", "closed"]
    """Storage of large files: none, one that has every chunk already, or one that refuses."""

    @classmethod
    def begin(cls) -> type["ReceivingHub"]:
        """Return a handler with a Hub of its own."""
        state = {"repositories": {"me/open": Repository(private=False)}, "objects": {}, "requests": []}
        return type("ReceivingHub", (cls,), {**state, "refuses_objects": False, "xet": "none"})

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        self.answer(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

    def do_GET(self) -> None:
        user = self.user()
        parts = self.begin_request().split("/")
        if parts[-1] == "whoami-v2":
            if user is None:
                self.refuse(401, "Invalid credentials in Authorization header")
            else:
                self.answer_json({"type": "user", "name": user})
        elif parts[-2] == "xet-write-token" and self.xet != "none":
            self.answer_json({"casUrl": f"{self.address}/xet", "accessToken": "xet", "exp": int(time.time()) + 3600})
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:]) in self.repositories:
            repository = self.repositories["/".join(parts[2:])]
            self.answer_json({"id": "/".join(parts[2:]), "sha": "a" * 40, "private": repository.private})
        else:
            self.refuse(404, "Repository not found", "RepoNotFound")

    def do_PUT(self) -> None:
        oid = self.begin_request().rpartition("/")[2]
        data = self.body()
        if self.refuses_objects:
            self.refuse(403, "File is larger than allowed")
        elif hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "another file")
        else:
            self.objects[oid] = data
            self.answer(200)

    def do_POST(self) -> None:
        path, body = self.begin_request(), self.body()
        if self.headers["Authorization"] == "Bearer hf_reader" and not path.endswith("validate-yaml"):
            self.refuse(403, "You don't have the rights to create a model under the namespace me.")
        elif path.startswith("xet/"):
            self.store(path)
        elif path.endswith("telemetry"):
            self.answer(200)
        elif path == "api/repos/create":
            self.create(json.loads(body))
        elif path == "api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body)["objects"])
        else:
            kind, *name, action, revision = path.removeprefix("api/").split("/")
            repository = self.repositories.get("/".join(name)) if kind == "models" else None
            if repository is None:
                self.refuse(404, "Repository not found", "RepoNotFound")
            elif action == "preupload":
                files = json.loads(body)["files"]
                modes = [("lfs" if file["path"].endswith(LARGE) else "regular", file["path"]) for file in files]
                self.answer_json(
                    {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for mode, p in modes]}
                )
            else:
                assert (action, revision) == ("commit", "main")
                self.commit("/".join(name), repository, body)

    # --- the calls ---

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{self.address}/{name}"}
        if not name.startswith("me/"):
            self.refuse(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}.")
        elif name in self.repositories or name == "me/texts":
            self.answer_json({**address, "error": "You already created this repo"}, 409)
        else:
            self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
            self.answer_json(address)

    def validate(self, card: str) -> None:
        if "license: nonsense" in card:
            self.answer_json({"errors": [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]}, 400)
        else:
            self.answer_json({"errors": [], "warnings": []})

    def batch(self, wanted: list[dict[str, Any]]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/objects/{one['oid']}"}}}
            for one in wanted
            if one["oid"] not in self.objects
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, path: str) -> None:
        """Answer as Xet does where all chunks of a file are there: then only its list of them (a shard) is sent."""
        if self.xet == "closed":
            self.refuse(403, "The storage is closed")
        elif "shards" in path:
            self.answer_json({"type": "result", "result": 1, "shard_hash": "0" * 64})
        else:
            self.answer_json({"was_inserted": False})

    def commit(self, name: str, repository: Repository, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "lfsFile"
                kept = f"xet {value['oid']} {value['size']}".encode() if self.xet == "full" else None
                repository.files[value["path"]] = kept or self.objects[value["oid"]]
        repository.commits.append(header["value"]["summary"])
        self.answer_json({"commitUrl": f"{self.address}/{name}/commit/{'b' * 40}", "commitOid": "b" * 40})

    # --- HTTP ---

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def begin_request(self) -> str:
        self.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0].strip("/")

    def user(self) -> str | None:
        return TOKENS.get((self.headers["Authorization"] or "").removeprefix("Bearer "))

    def body(self) -> bytes:
        if "chunked" not in (self.headers["Transfer-Encoding"] or ""):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def write_files(repository: Repository, folder: Path) -> Path:
    """Put what the Hub has into a folder, as a download would."""
    folder.mkdir()
    for name, data in repository.files.items():
        (folder / name).write_bytes(data)
    return folder
