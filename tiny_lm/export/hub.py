"""Push a verified export to the Hugging Face Hub: only its files, in one commit."""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_lm.dataset.huggingface import is_network_error
from tiny_lm.errors import UserError
from tiny_lm.export.model_card import CARD_FILE
from tiny_lm.tokenizer import chat_template

# --- allowed files ---------------------------------------------------------------------------------------------------


_OPTIMIZER = re.compile(r"optimizer|exp_avg|momentum_buffer")
_HEADER_LIMIT = 100_000_000  # bytes, as in the format's own library


def _is_text(file: Path) -> bool:
    try:
        return "\0" not in file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_weights(file: Path) -> bool:
    """Whether a file has a safetensors header (its length, then JSON) without optimizer state."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(_HEADER_LIMIT, file.stat().st_size):
            return False
        try:
            names = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            return False
    return isinstance(names, dict) and not any(_OPTIMIZER.search(name) for name in names)


def _begins_with(magic: bytes) -> Callable[[Path], bool]:
    def check(file: Path) -> bool:
        with file.open("rb") as opened:
            return opened.read(len(magic)) == magic

    return check


ALLOWED: Mapping[str, Callable[[Path], bool]] = {
    "*.safetensors": _is_weights,
    "*.gguf": _begins_with(b"GGUF"),
    "*.json": _is_json,
    CARD_FILE: _is_text,
    chat_template.FILE: _is_text,
    "tokenizer.model": _begins_with(b"\n"),  # SentencePiece: the first field of its protocol buffer, a piece
}
"""Allowed files: name patterns, and a check that the content matches."""


def allowed_files(folder: Path) -> list[Path]:
    """Return the files of an export, sorted by name.

    Raises:
        UserError: the folder has any other file, such as a checkpoint, a pickle under whatever name, or a link.
    """
    files = sorted(folder.iterdir())
    for file in files:
        checks = [check for pattern, check in ALLOWED.items() if fnmatch.fnmatchcase(file.name, pattern)]
        if file.is_symlink() or not file.is_file() or not checks:
            raise UserError(f"{file}: not allowed on the Hub, only {', '.join(ALLOWED)} are; nothing was sent")
        if not checks[0](file):
            raise UserError(f"{file}: its content does not match its name; nothing was sent")
    return files


# --- destination -----------------------------------------------------------------------------------------------------


_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class Target:
    """A model repository on the Hub.

    Attributes:
        repo_id: ``user/name`` or ``organization/name``.
        private: whether only the owner may see it.
    """

    repo_id: str
    private: bool = False

    def __post_init__(self) -> None:
        """Raise UserError unless the name follows the Hub's own rules."""
        parts = self.repo_id.split("/")
        sound = all(_NAME.fullmatch(part) for part in parts) and not re.search(r"--|\.\.|\.git$", self.repo_id)
        if sound and len(parts) == 1:
            raise UserError(f"--repo-id {self.repo_id}: must include the owner, as in user/{self.repo_id}")
        if not sound or len(parts) != 2:
            raise UserError(
                f"--repo-id {self.repo_id}: not a valid name on the Hub; in user/name both consist of letters, digits, "
                "'-', '_' or '.' (at most 96), without '-' or '.' at either end or twice in a row"
            )

    @property
    def url(self) -> str:
        """URL of the repository."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo_id}"


def check_license(name: str) -> None:
    """Raise UserError unless ``name`` is a license identifier of the Hub: ``mit``, ``cc-by-4.0``, ..."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name):
        raise UserError(f"--license {name}: not a license identifier such as mit, apache-2.0 or cc-by-4.0")


def check_access(target: Target) -> None:
    """Raise UserError unless one request shows that the Hub is reachable and accepts the token."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"{target.repo_id}: no token for the Hub; log in with `hf auth login`, or set the variable HF_TOKEN"
        )
    with _as_user_error(target):
        HfApi().whoami()


def send(files: Sequence[Path], target: Target, message: str) -> str:
    """Create the repository if it does not exist, and commit the files.

    Args:
        files: as :func:`allowed_files` returns them; other files in the repository are kept.
        target: the repository.
        message: the commit message.

    Returns:
        the URL of the commit.

    Raises:
        UserError: the Hub cannot be reached or refuses, or the repository is public where a private one was requested.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _as_user_error(target):
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if target.private and not api.repo_info(target.repo_id).private:
            raise UserError(
                f"{target.repo_id}: already exists and is public, which --private does not change; make it private in "
                f"its settings ({target.url}/settings) or choose another --repo-id"
            )
        _choose_transfer(target)
        commit = api.create_commit(
            target.repo_id,
            [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files],
            commit_message=message,
        )
    return str(commit.commit_url)


def _choose_transfer(target: Target) -> None:
    """Use Git LFS for large files if the Hub has no Xet, which the client would otherwise retry for minutes."""
    from huggingface_hub import constants, get_session, get_token

    url = f"{constants.ENDPOINT}/api/models/{target.repo_id}/xet-write-token/main"
    if get_session().get(url, headers={"Authorization": f"Bearer {get_token()}"}).status_code == 404:
        constants.HF_HUB_DISABLE_XET = True  # what the environment variable of this name sets


@contextmanager
def _as_user_error(target: Target) -> Iterator[None]:
    """Convert any error of the client to a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no common base: classes of the client, of the HTTP library and of Xet, ValueError
        raise UserError(_explain(error, target)) from error


def _explain(error: Exception, target: Target) -> str:
    """Describe in one line what went wrong and what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    message: Any = getattr(error, "server_message", None) or str(error)
    reason = " ".join(str(message).split())[:300] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return f"{target.repo_id}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it"
    if type(error) is ConnectionError:  # from Xet, whose storage has another host
        instead = "set HF_HUB_DISABLE_XET=1 to send the files through Git LFS"
        return f"{target.repo_id}: the Hub's storage of large files cannot be reached ({reason}); {instead}"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # it names the file
        return f"{reason} {_explain(error.__cause__, target)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and is_network_error(error):
        return f"{target.url}: the Hugging Face Hub cannot be reached; check the network and run the command again"
    problem = {
        401: "the Hub rejected the token; log in again with `hf auth login`, or correct HF_TOKEN",
        403: "no write permission; use a token with write access, or a user name of yours",
        404: "the Hub has no model of this name; is it a data set or a Space? choose another --repo-id",
    }.get(status or 0, "the Hub refused, and nothing was committed")
    return f"{target.repo_id}: {problem} ({reason})"
