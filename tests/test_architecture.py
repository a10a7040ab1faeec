"""The shape of the house: who imports whom, how long things are, what is loaded when."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tiny_lm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room imports only rooms on earlier lines; rooms of one line do not know each other.
LINES = [
    ["errors", "signals", "environment"],
    ["console", "locks", "hardware", "reading"],
    ["files", "pages"],
    ["config"],
    ["profile", "runs"],
    ["dataset", "model", "tracking"],
    ["tokenizer"],
    ["data"],
    ["inference"],
    ["training", "evaluation"],
    ["export"],
    ["serving"],
    ["cli"],
]
LEVEL = {room: number for number, line in enumerate(LINES) for room in line}
# `model` stands apart from text: it knows nothing of these, although their lines come earlier.
MODEL_KNOWS = {"errors", "files", "reading", "config"}

# Library -> where alone it may be imported.
CONFINED = {
    "pytorch_lightning": ("training/", "tracking/", "data/bin/data_module.py"),
    "lightning_utilities": ("tracking/",),
    "transformers": ("export/",),
    "safetensors": ("model/huggingface_folder.py", "export/"),
    "huggingface_hub": ("dataset/huggingface.py", "export/hub.py"),
    "gguf": ("export/gguf_file.py",),
    "llama_cpp": ("export/llamacpp_engine.py",),
    "onnx": ("export/onnx_graph.py",),
    "onnxscript": ("export/onnx_graph.py",),
    "onnxruntime": ("export/onnx_graph.py", "export/onnx_engine.py", "export/onnx_generate.py"),
    "tokenizers": ("export/onnx_graph.py", "export/onnx_generate.py"),
    "trackio": ("tracking/trackio_logger.py",),
    "wandb": ("tracking/loggers.py",),
    "datasets": ("dataset/huggingface.py",),
    "typer": ("cli/",),
    "lm_eval": ("evaluation/harness.py", "evaluation/harness_model.py"),
    "httpx": ("evaluation/judge.py", "serving/engines.py"),
    "jinja2": ("evaluation/report/", "serving/api_page.py", "serving/template_worker.py"),
    "fastapi": ("serving/",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
    "prometheus_client": ("serving/",),
    "gradio": ("serving/demo/",),
}
# Imported inside functions only: they are slow to load, and most commands do not need them.
LAZY = {"datasets", "tiktoken", "rustbpe", "sentencepiece", "matplotlib", "pyarrow", "trackio", "wandb"}
LAZY |= {"transformers", "safetensors", "httpx", "jinja2", "gguf", "llama_cpp", "huggingface_hub", "gradio"}
LAZY |= {"onnx", "onnxscript"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the modules that a file imports, and whether the import stands at its top level."""
    top = {id(node) for node in getattr(tree, "body", [])}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_its_place(path: Path) -> None:
    if path.parent == PACKAGE and path.name == "__init__.py":
        return  # the front door, which names things in every room; below, a test that it loads none of them
    room = room_of(path)
    place = path.relative_to(PACKAGE).as_posix()
    for module, at_top in imports(ast.parse(path.read_text(encoding="utf-8"))):
        library, *rest = module.split(".")
        if library == "tiny_lm":
            other = rest[0] if rest else "__init__"
            if other in (room, "__init__"):
                continue
            assert LEVEL[other] < LEVEL[room], f"{place} imports {module}, which stands to its right"
            assert room != "model" or other in MODEL_KNOWS, f"{place} imports {module}: the model knows only its config"
        if library in CONFINED:
            assert place.startswith(CONFINED[library]), f"{place} imports {module}, which belongs elsewhere"
        assert not (library in LAZY and at_top), f"{place} imports {module} at its top; import it where it is used"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_can_be_read_at_a_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_package_loads_nothing_heavy() -> None:
    loaded = run("import sys, tiny_lm; print(*sys.modules)").split()
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(loaded)


def test_the_command_line_loads_nothing_heavy() -> None:
    loaded = set(run("import sys, tiny_lm.cli; print(*sys.modules)").split())
    assert not {"torch", "numpy", "pytorch_lightning", "datasets", "tiktoken"} & loaded


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{path}:{node.lineno}"
            if name == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_no_workplace_path_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("no git checkout here")
    words = ["pypi" + ".org", "python" + "hosted", "npmjs" + ".org", "registry" + ".yarnpkg"]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".gz"):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in words if word in text], f"{name} names a package registry's host"


def test_no_two_tests_have_one_id(request: pytest.FixtureRequest) -> None:
    """pytest-xdist runs one test for each id, and says nothing of the others."""
    times = Counter(test.nodeid for test in request.session.items)
    assert [name for name, number in times.items() if number > 1] == []
