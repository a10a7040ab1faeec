"""The Hugging Face Hub: the files of a proven export, in one commit, and nothing else."""

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

# --- what may go -----------------------------------------------------------------------------------------------------


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
    """Whether a file begins as safetensors do, with the length of a header and that, and holds no optimizer's state."""
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


ADMITTED: Mapping[str, Callable[[Path], bool]] = {
    "*.safetensors": _is_weights,
    "*.gguf": _begins_with(b"GGUF"),
    "*.json": _is_json,
    CARD_FILE: _is_text,
    chat_template.FILE: _is_text,
    "tokenizer.model": _begins_with(b"\n"),  # SentencePiece: the first field of its protocol buffer, a piece
}
"""What is sent: patterns of names, and a look into the file that shows it to be what it is called."""


def admitted_files(folder: Path) -> list[Path]:
    """Return the files of an export in the order of their names; every one is of a kind that is sent.

    Raises:
        UserError: the folder holds anything else, such as a checkpoint, a pickle under whatever name, or a link.
    """
    files = sorted(folder.iterdir())
    for file in files:
        checks = [check for pattern, check in ADMITTED.items() if fnmatch.fnmatchcase(file.name, pattern)]
        if file.is_symlink() or not file.is_file() or not checks:
            raise UserError(f"{file}: is not sent to the Hub, which gets only {', '.join(ADMITTED)}; nothing was sent")
        if not checks[0](file):
            raise UserError(f"{file}: does not hold what its name says, so it is not sent; nothing was sent")
    return files


# --- where it goes ---------------------------------------------------------------------------------------------------


_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class Target:
    """A repository of models on the Hub.

    Attributes:
        repo_id: ``user/name`` or ``organization/name``.
        private: whether only the owner may see it.
    """

    repo_id: str
    private: bool = False

    def __post_init__(self) -> None:
        """Check the name by the Hub's own rule.

        Raises:
            UserError: it is no name of a repository.
        """
        parts = self.repo_id.split("/")
        sound = all(_NAME.fullmatch(part) for part in parts) and not re.search(r"--|\.\.|\.git$", self.repo_id)
        if sound and len(parts) == 1:
            raise UserError(f"--repo-id {self.repo_id}: must name the owner, too, as in user/{self.repo_id}")
        if not sound or len(parts) != 2:
            raise UserError(
                f"--repo-id {self.repo_id}: is no name on the Hub; in user/name both have letters, digits, '-', '_' or "
                "'.' (at most 96), and no '-' or '.' at an end or twice in a row"
            )

    @property
    def url(self) -> str:
        """Address of the repository's page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo_id}"


def check_license(name: str) -> None:
    """Check that a license is an identifier as the Hub has them: ``mit``, ``apache-2.0``, ``cc-by-4.0``.

    Raises:
        UserError: it is none.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name):
        raise UserError(f"--license {name}: is no identifier of a license, such as mit, apache-2.0 or cc-by-4.0")


def check_access(target: Target) -> None:
    """Check with one question that there is a network and a token that the Hub knows.

    Raises:
        UserError: there is not.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"{target.repo_id}: no token for the Hub; log in with `hf auth login`, or set the variable HF_TOKEN"
        )
    with _told(target):
        HfApi().whoami()


def send(files: Sequence[Path], target: Target, message: str) -> str:
    """Create the repository where it is not there, and put files into it in one commit.

    Args:
        files: as :func:`admitted_files` returns them; they keep their names, and files of other names stay.
        target: the repository.
        message: of the commit.

    Returns:
        the address of the commit.

    Raises:
        UserError: the Hub cannot be reached, refuses, or has a public repository where a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _told(target):
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if target.private and not api.repo_info(target.repo_id).private:
            raise UserError(
                f"{target.repo_id}: is there already, and public, which --private does not change; make it private in "
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
    """Send large files in the plain way (Git LFS) to a Hub without Xet, for which the client would try for minutes."""
    from huggingface_hub import constants, get_session, get_token

    place = f"{constants.ENDPOINT}/api/models/{target.repo_id}/xet-write-token/main"
    if get_session().get(place, headers={"Authorization": f"Bearer {get_token()}"}).status_code == 404:
        constants.HF_HUB_DISABLE_XET = True  # what the variable of this name sets


@contextmanager
def _told(target: Target) -> Iterator[None]:
    """Turn whatever the client raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no common base: classes of the client, of the HTTP library and of Xet, ValueError
        raise UserError(_explain(error, target)) from error


def _explain(error: Exception, target: Target) -> str:
    """Say in one line what went wrong, and what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    said: Any = getattr(error, "server_message", None) or str(error)
    reason = " ".join(str(said).split())[:300] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return f"{target.repo_id}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it"
    if type(error) is ConnectionError:  # as Xet has it, whose storage stands elsewhere than the Hub
        instead = "set HF_HUB_DISABLE_XET=1 to send the files in the plain way"
        return f"{target.repo_id}: the Hub's storage of large files cannot be reached ({reason}); {instead}"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # it names the file
        return f"{reason} {_explain(error.__cause__, target)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and is_network_error(error):
        return f"{target.url}: the Hugging Face Hub cannot be reached; check the network and run the command again"
    told = {
        401: "the Hub does not know the token; log in again with `hf auth login`, or mend HF_TOKEN",
        403: "the Hub does not let you write this; give the token the right to write, or name a user of yours",
        404: "the Hub has no model of this name; is it a data set or a Space? choose another --repo-id",
    }.get(status or 0, "the Hub refused, and nothing was committed")
    return f"{target.repo_id}: {told} ({reason})"
