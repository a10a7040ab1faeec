"""An archive (.mar) for TorchServe: the model as a Hugging Face folder, a handler, and the manifest."""

import importlib.util
import json
import math
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from tiny_lm import TextGenerator
from tiny_lm.export import torchserve_handler
from tiny_lm.export.agreement import Reference
from tiny_lm.export.huggingface import DTYPES, check_finite, check_space, write_huggingface
from tiny_lm.export.serve_config import model_name
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import GREEDY_TOKENS, PROMPTS, REPORT_FILE, Check, raise_on_failure, write_report
from tiny_lm.files import atomic_folder, check_free, write_text
from tiny_lm.inference.request import GenerationConfig
from tiny_lm.model import num_parameters
from tiny_lm.model.huggingface import Dtype

PORT = 8080
CONFIG_FILE = "config.properties"
_MANIFEST = "MAR-INF/MANIFEST.json"
_ARCHIVER_VERSION = "0.12.0"  # the last version of the archive layout


def export_torchserve(
    source: ExportSource, folder: Path, *, dtype: Dtype = "float32", port: int = PORT, force: bool = False
) -> list[Check]:
    """Write the archive and a configuration beside it; unpack it, load its handler, and compare its output.

    Args:
        source: what to export.
        folder: to write.
        dtype: of the weights in the archive; they are compared with ours rounded alike.
        port: of predictions, on 127.0.0.1; the four after it are for management, metrics and gRPC.
        force: replace an earlier export.

    Returns:
        the checks, all of them passed.

    Raises:
        UserError: the folder is not empty, the disk is full, or a check failed.
    """
    replaceable = REPORT_FILE if force else None
    check_free(folder, replaceable=replaceable)
    check_space(folder, 3 * num_parameters(source.config) * DTYPES[dtype].itemsize)  # files, archive, files unpacked
    rounded = source.with_weights_as(DTYPES[dtype])
    check_finite(rounded, dtype)
    name = model_name(source)
    with atomic_folder(folder, replaceable=replaceable) as temporary:
        archive = temporary / f"{name}.mar"
        with TemporaryDirectory(dir=temporary) as scratch:
            model, unpacked = Path(scratch) / "model", Path(scratch) / "unpacked"
            model.mkdir()
            write_huggingface(source, model, dtype=dtype)
            write_archive(archive, model, name)
            with zipfile.ZipFile(archive) as file:
                file.extractall(unpacked)
            checks = _verify(rounded, unpacked)
        write_text(temporary / CONFIG_FILE, configuration(port))
        write_report(temporary, source, "torchserve", {archive.name: {"engine": "its own handler", "checks": checks}})
        raise_on_failure(str(folder), checks)
    return checks


def write_archive(archive: Path, model: Path, name: str) -> None:
    """Write a .mar: a zip file with the files at its root, and a manifest.

    Args:
        archive: to write.
        model: a Hugging Face folder.
        name: under which TorchServe serves it.
    """
    handler = Path(torchserve_handler.__file__)
    manifest = {
        "createdOn": f"{datetime.now(timezone.utc):%d/%m/%Y %H:%M:%S}",
        "runtime": "python",
        "model": {"modelName": name, "handler": handler.name, "modelVersion": "1.0"},
        "archiverVersion": _ARCHIVER_VERSION,
    }
    with zipfile.ZipFile(archive, "w", compression=zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        for path in sorted(model.iterdir()):
            file.write(path, path.name)
        file.write(handler, handler.name)
        file.writestr(_MANIFEST, json.dumps(manifest, indent=2))


def configuration(port: int) -> str:
    """Return a ``config.properties``: everything on loopback, one worker, small requests.

    TorchServe names its workers' sockets in the temporary folder by numbers from ``initial_worker_port``, which
    therefore depends on the port too: two servers do not collide.
    """
    return f"""inference_address=http://127.0.0.1:{port}
management_address=http://127.0.0.1:{port + 1}
metrics_address=http://127.0.0.1:{port + 2}
grpc_inference_address=127.0.0.1
grpc_inference_port={port + 3}
grpc_management_address=127.0.0.1
grpc_management_port={port + 4}
initial_worker_port={port + 5}
default_workers_per_model=1
max_request_size=262144
"""


def serve_words(folder: Path, source: ExportSource) -> list[str]:
    """Return the command that serves the output of :func:`export_torchserve`."""
    name = model_name(source)
    words = ["torchserve", "--start", "--foreground", "--ncs", "--disable-token-auth", "--model-store", str(folder)]
    return [*words, "--models", f"{name}={name}.mar", "--ts-config", str(folder / CONFIG_FILE)]


def load_handler(folder: Path) -> Any:
    """Load the handler named in an unpacked archive's manifest, and let it load the model."""
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    specification = importlib.util.spec_from_file_location("handler", folder / manifest["model"]["handler"])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    handler = module.TinyLMHandler()
    handler.initialize(SimpleNamespace(system_properties={"model_dir": str(folder), "gpu_id": None}))
    return handler


def _verify(source: ExportSource, folder: Path) -> list[Check]:
    """Run the prompts through an unpacked archive's handler, and compare with our generator."""
    content = {"max_new_tokens": GREEDY_TOKENS, "temperature": 0, "logprobs": True}
    answers = load_handler(folder).handle([{"body": {"prompt": prompt, **content}} for prompt in PROMPTS], None)
    generator = TextGenerator(source.model, source.tokenizer)
    request = GenerationConfig(max_new_tokens=GREEDY_TOKENS, temperature=0, logprobs=0)
    expected = generator.generate_batch(PROMPTS, request)
    texts = [made.prompt + made.text for made in expected]
    wrong = sum(answer["text"] != text for answer, text in zip(answers, texts, strict=True))
    ours = [drawn.logprob for made in expected for drawn in made.logprobs]
    theirs = [value for answer in answers for value in answer["logprobs"]]
    same_length, limit = len(ours) == len(theirs), Reference(source).difference_limit
    largest = max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0) if same_length else math.inf
    return [
        Check(f"greedy completion of {len(PROMPTS)} prompts", wrong, f"{wrong} texts differ", "0 differ", wrong == 0),
        Check(
            f"log-probabilities of {len(ours)} tokens of it",
            largest,
            f"largest difference {largest:.2g}",
            f"{limit:.2g}",
            largest <= limit,
        ),
    ]
