import pytest
import torch
from generators import FAMILIES, make

from tiny_lm.inference.backends.onednn import BatchedDecodeAttention, pack
from tiny_lm.model import reference_attention
from tiny_lm.tokenizer import Tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_packed_model_computes_what_the_model_does(family: str, qkv_bias: bool, tokenizer: Tokenizer) -> None:
    model = make(tokenizer, family, qkv_bias=qkv_bias).model
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    packed = pack(model)
    ids = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids)
        torch.testing.assert_close(packed(ids), expected, rtol=0, atol=1e-5 * float(expected.std()) + 1e-5)
        cache = packed.new_cache(3)
        cached = torch.cat([packed(ids[:, :17], cache), packed(ids[:, 17:], cache)], dim=1)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5 * float(expected.std()) + 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_many_rows_is_that_of_the_reference(kv_heads: int, rows: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batched_attention = BatchedDecodeAttention()
    for capacity in (32, 32, 48):  # with other lengths, and in a cache of another size
        q = torch.randn(rows, 1, 4, 16, generator=generator).transpose(1, 2)
        k, v = (torch.randn(rows, kv_heads, capacity, 16, generator=generator)[:, :, :25] for _ in range(2))
        lengths = torch.randint(1, 26, (rows, 1, 1, 1), generator=generator)
        mask = torch.arange(25) < lengths if masked else None
        expected = reference_attention(q, k, v, mask)
        for _ in range(2):  # two layers
            torch.testing.assert_close(batched_attention(q, k, v, mask), expected, rtol=0, atol=1e-6)


def test_many_rows_of_one_token_attend_without_a_cache(tokenizer: Tokenizer) -> None:
    model = make(tokenizer, "qwen3").model
    ids = torch.arange(40)[:, None]
    with torch.inference_mode():
        torch.testing.assert_close(pack(model)(ids), model(ids), rtol=0, atol=2e-5)


def test_packing_leaves_the_model_alone_and_shares_its_embedding(tokenizer: Tokenizer) -> None:
    model = make(tokenizer).model
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    packed = pack(model)
    assert next(packed.parameters()) is model.token_emb.weight
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.blocks[0].attn.W_q.weight.grad is not None


def test_other_precisions_are_left_as_they_are(tokenizer: Tokenizer) -> None:
    model = make(tokenizer).model.to(torch.bfloat16)
    assert pack(model) is model
