r"""File names that are not UTF-8, such as from old archives, as text that every file and terminal can represent.

Python reads a byte that is not UTF-8 as half of a surrogate pair, which UTF-8 cannot encode. Configs, metadata and
messages write it as ``\xe9`` instead, and :func:`path_from_name` finds the file again.
"""

import os
import re
from pathlib import Path

_UNDECODABLE = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")


def name_from_path(path: Path | str) -> str:
    r"""Return a path as text: bytes that are not UTF-8 become ``\xNN``."""
    return _UNDECODABLE.sub(lambda half: f"\\x{ord(half[0]) - 0xDC00:02x}", str(path))


def path_from_name(name: str) -> Path:
    r"""Return the path that a name means: ``~`` is the home directory, and ``\xNN`` a byte unless a file has that name.

    Raises:
        RuntimeError: the home directory of a user who does not exist.
    """
    path = Path(name).expanduser()
    if os.name == "nt" or not _ESCAPED.search(name) or path.exists():
        return path
    return Path(_ESCAPED.sub(lambda code: chr(0xDC00 + int(code[1], 16)), str(path)))
