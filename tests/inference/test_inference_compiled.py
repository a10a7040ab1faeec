from itertools import pairwise

import pytest
import torch
from generators import FAMILIES, make

from tiny_lm.errors import UserError
from tiny_lm.hardware.compiler import missing_compiler
from tiny_lm.inference import GenerationConfig
from tiny_lm.inference.backends.compiled import CompiledStep, GemvLinear
from tiny_lm.inference.decoding import prefill
from tiny_lm.tokenizer import Tokenizer


@pytest.mark.parametrize("size", [1, 16, 37])
def test_a_product_written_as_a_sum_has_any_number_of_outputs(size: int) -> None:
    linear, x = torch.nn.Linear(7, size), torch.randn(2, 7)
    torch.testing.assert_close(GemvLinear(linear)(x), linear(x))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family == "llama3" else pytest.mark.deep) for family in FAMILIES]
)
def test_a_compiled_step_computes_what_the_model_does(family: str, tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, family, qkv_bias=True)
    model = generator.model
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    step = CompiledStep(model)
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    caches = [model.new_cache(1) for _ in range(2)]
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = model(ids)[0]
        for cache, first, last in zip(caches, (1, 17), (5, 64), strict=True):
            prefill(model, [ids[0, :first].tolist()], cache)
            for place in range(first, last):
                logits = step(model, ids[0, place : place + 1].clone(), cache)
                tolerance = 1e-5 * float(expected.std()) + 1e-5
                torch.testing.assert_close(logits[0], expected[place], rtol=0, atol=tolerance)
            assert cache.lengths == [last]


def test_compiled_texts_are_the_same_alone_in_a_batch_and_beyond_the_context(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, "qwen3")
    prompts, request = (
        ["One day", "The little fox went home and"],
        GenerationConfig(max_new_tokens=90, min_new_tokens=90, temperature=0),
    )
    expected = [text.ids for text in generator.generate_batch(prompts, request)]
    generator.compile()
    assert [text.ids for text in generator.generate_batch(prompts, request)] == expected
    assert [generator.generate_batch([prompt], request)[0].ids for prompt in prompts] == expected


@pytest.mark.deep
def test_models_that_are_compiled_in_one_process_stay_apart(tokenizer: Tokenizer) -> None:
    request = GenerationConfig(max_new_tokens=20, min_new_tokens=20, temperature=0)
    generators = [make(tokenizer, n_layers=1, d_ff=size) for size in (16, 32, 64)]
    expected = [generator.generate_batch(["One day"], request)[0].ids for generator in generators]
    assert all(a != b for a, b in pairwise(expected))
    with torch._dynamo.config.patch(recompile_limit=1):  # torch compiles no function more often than that
        for generator in generators:
            generator.compile()
    assert [generator.generate_batch(["One day"], request)[0].ids for generator in generators] == expected


def test_without_a_compiler_one_line_says_so(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler" in str(missing_compiler("cpu"))
    with pytest.raises(UserError, match=r"the decoding step cannot be compiled: .* needs a C\+\+ compiler"):
        make(tokenizer).compile()
