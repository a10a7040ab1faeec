"""GGUF files in llama.cpp's own server, which Ollama too runs them in; ``make test-llama-server`` builds it."""

import dataclasses
from pathlib import Path

import pytest
from llama_server import EXACT_FLAGS, OLLAMA_FLAGS, LlamaServerEngine, serve
from modelfile_grammar import parameters, read_modelfile
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.export.gguf import llama_cpp_reference
from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.modelfile import modelfile
from tiny_lm.export.ollama import completion_loss, garbled_from
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.verify import PROMPTS, OwnEngine, check_greedy, check_tokens
from tiny_lm.inference import TextGenerator

pytestmark = pytest.mark.llama_server


def write(source: ExportSource, file: Path, kind: str = "F32") -> Path:
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), file, kind)
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_same_model(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family, unused_rows=3).folder)
    own = OwnEngine(source)
    with serve(write(source, tmp_path / "x.gguf"), *EXACT_FLAGS) as client:
        engine = LlamaServerEngine(client, source)
        # The server leaves one place free for its answer, so that the last row of a window cannot be asked for.
        shorter = dataclasses.replace(
            source, config=dataclasses.replace(source.config, context_length=source.config.context_length - 1)
        )
        checks = check_tokens(source, own, engine)
        reference = llama_cpp_reference(shorter, engine)
        checks += reference.check(engine)
        checks.append(check_greedy(shorter, own, engine, reference.difference_limit))
        assert [(check.name, check.result) for check in checks if not check.passed] == []
        # A prompt of text is begun as in training, and answered by our own text.
        generator = TextGenerator(source.model, source.tokenizer)
        for prompt in PROMPTS:
            asked = {"prompt": prompt, "n_predict": 48, "temperature": 0, "cache_prompt": False}
            answer = engine.post("/completion", **asked, logit_bias=engine.banned)
            assert answer["tokens_evaluated"] == len(source.tokenizer.encode(prompt, bos=True))
            assert prompt + answer["content"] == generator.generate(prompt, 48, temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_modelfile_s_parameters_as_ollama_passes_them(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family).folder)
    commands = read_modelfile(modelfile(source, "x.gguf"))
    asked = parameters(commands)
    flags = [*OLLAMA_FLAGS, "-c", str(asked["num_ctx"]), "-b", "512", "-ub", "512"]
    file = write(source, tmp_path / dict(commands)["from"], "F16")
    with serve(file, *flags) as client:
        settings = client.get("/props").json()["default_generation_settings"]
        assert settings["n_ctx"] == source.config.context_length
        engine = LlamaServerEngine(client, source)
        prompt = dict(commands)["template"].replace("{{ .Prompt }}", PROMPTS[0])
        drawn = {name: asked[name] for name in ("temperature", "top_k", "top_p", "repeat_penalty", "stop")}
        answer = engine.post("/completion", prompt=prompt, n_predict=asked["num_predict"], seed=1, min_p=0, **drawn)
    used = answer["generation_settings"]
    assert used["stop"] == ["<eos>", "<bos>"]
    assert {name: pytest.approx(used[name]) for name in drawn if name != "stop"} == {
        name: value for name, value in drawn.items() if name != "stop"
    }
    assert answer["tokens_evaluated"] == len(source.tokenizer.encode(PROMPTS[0], bos=True))
    assert answer["stop_type"] in ("eos", "limit")
    assert "<" not in answer["content"]
    assert completion_loss(source, PROMPTS[0], answer["content"]) <= garbled_from(source)
