"""Attention against its reference, rotary positions, and decoding with a cache against the full forward."""

import pytest
import torch
from families import FAMILIES, family_model
from reference import randomize

from tiny_lm.model import RoPE, apply_rotary_emb, attend, blocked_attention, reference_attention


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 9), (9, 9)])
def test_fused_attention_equals_the_reference(heads, lengths):
    torch.manual_seed(0)
    (queries, groups), (new, seen) = heads, lengths
    q, k, v = (torch.randn(3, n, t, 8) for n, t in ((queries, new), (groups, seen), (groups, seen)))
    torch.testing.assert_close(attend(q, k, v), reference_attention(q, k, v), rtol=0, atol=1e-5)


def test_fused_attention_equals_the_reference_with_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)
    torch.testing.assert_close(attend(q, k, v, mask), reference_attention(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (128, 128), (129, 129), (300, 300), (200, 330)])
def test_attention_in_blocks_equals_the_reference(lengths):
    torch.manual_seed(0)
    new, seen = lengths
    q, k, v = (torch.randn(2, n, t, 8, requires_grad=True) for n, t in ((4, new), (2, seen), (2, seen)))
    weight = torch.randn(2, 4, new, 8)
    blocked, whole = blocked_attention(q, k, v), reference_attention(q, k, v)
    torch.testing.assert_close(blocked, whole, rtol=0, atol=1e-5)
    gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (blocked, whole))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_gradients_of_fused_attention_equal_those_of_the_reference():
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 7, 8, requires_grad=True) for n in (4, 2, 2)]
    weight = torch.randn(2, 4, 7, 8)
    fused = torch.autograd.grad((attend(*inputs) * weight).sum(), inputs)
    reference = torch.autograd.grad((reference_attention(*inputs) * weight).sum(), inputs)
    torch.testing.assert_close(fused, reference, rtol=0, atol=1e-5)


def test_rope_keeps_lengths_and_sees_only_distances():
    torch.manual_seed(0)
    rope = RoPE(dim=16, max_seq_len=64, theta=10_000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def turned(x, position):
        return apply_rotary_emb(x, rope(torch.tensor([position])))

    def score(query_position, key_position):
        return (turned(q, query_position) * turned(k, key_position)).sum()

    torch.testing.assert_close(turned(q, 37).norm(), q.norm())
    torch.testing.assert_close(score(5, 2), score(63, 60), rtol=0, atol=1e-5)
    assert not torch.isclose(score(5, 2), score(5, 3), atol=1e-3)


def test_rope_tables_stay_float32_and_survive_a_build_without_memory():
    fresh = RoPE(dim=16, max_seq_len=64, theta=10_000.0)
    rope = RoPE(dim=16, max_seq_len=64, theta=10_000.0).to(torch.bfloat16)
    assert rope.cos.dtype == torch.float32
    x = torch.randn(1, 2, 3, 16, dtype=torch.bfloat16)
    assert apply_rotary_emb(x, rope(torch.arange(3))).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = RoPE(dim=16, max_seq_len=64, theta=10_000.0)
    empty.to_empty(device="cpu")
    assert torch.equal(empty.cos, fresh.cos) and torch.equal(rope.sin, fresh.sin)
    assert not fresh.state_dict()


@pytest.mark.parametrize("steps", [[24], [1] * 24, [7, 1, 1, 4, 1, 10], [3, 21]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family, steps):
    model = family_model(family).eval()
    randomize(model, seed=1)
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(batch_size=3)
    cached = torch.cat([model(part, cache) for part in ids.split(steps, dim=1)], dim=1)
    full = model(ids)
    # These weights make logits of up to about 20; the tolerance is 1e-5 of the spread.
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=1e-5 * max(1.0, full.std().item()))
    assert cache.lengths == [24, 24, 24]


@torch.no_grad()
def test_a_cache_forgets_what_its_length_leaves_out():
    model = family_model("llama3").eval()
    ids = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, max_length=16)
    model(ids, cache)
    cache.lengths = [5]
    torch.testing.assert_close(model(ids[:, 5:], cache), model(ids)[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_cache_have_lengths_of_their_own(family):
    model = family_model(family).eval()
    randomize(model, seed=1)
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(0))
    lengths = [9, 4, 14]
    cache = model.new_cache(3)
    model(ids[:, :14], cache)
    cache.lengths = list(lengths)  # what was read behind them is forgotten
    parts = [torch.stack([ids[row, n + i : n + i + 2] for row, n in enumerate(lengths)]) for i in (0, 2, 4)]
    decoded = torch.cat([model(part, cache) for part in parts], dim=1)
    full = model(ids)
    expected = torch.stack([full[row, n : n + 6] for row, n in enumerate(lengths)])
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5 * max(1.0, full.std().item()))
    assert cache.lengths == [15, 10, 20]

    last = cache.rows(1, 3, [0, 20])  # a row is read anew without the first one
    model(torch.stack([ids[0, :4], ids[2, 20:24]]), last)
    assert last.lengths == [4, 24] and cache.lengths == [15, 10, 20]
    last.copy_row(0, 1, 3)  # and copied over its neighbour, but for a token
    last.lengths = [4, 3]
    again = model(torch.stack([ids[0, 4:6], ids[0, 3:5]]), last)
    first = model(ids[:1, 15:16], cache.rows(0, 1, [15]))
    for got, wanted in ((again[0], full[0, 4:6]), (again[1], full[0, 3:5]), (first[0], full[0, 15:16])):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, full.std().item()))


@torch.no_grad()
def test_a_cache_of_less_precision_is_close():
    model = family_model("qwen3").eval()
    ids = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, dtype=torch.bfloat16)
    cached = torch.cat([model(ids[:, :6], cache), model(ids[:, 6:], cache)], dim=1)
    assert cache.keys[0].dtype == torch.bfloat16 and cached.dtype == torch.float32
    torch.testing.assert_close(cached, model(ids), rtol=0, atol=0.02)


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = family_model("gpt2").eval()
    ids = torch.zeros(1, 25, dtype=torch.long)
    with pytest.raises(ValueError, match="25 tokens do not fit into the context of 24"):
        model(ids)
    cache = model.new_cache(1, max_length=10)
    model(ids[:, :8], cache)
    with pytest.raises(ValueError, match="holds 8 of at most 10 tokens: no room for 3 more"):
        model(ids[:, :3], cache)
    with pytest.raises(ValueError, match="for a batch of 1, not of 2"):
        model(ids[:, :2].expand(2, -1), cache)
    assert cache.lengths == [8]
    for length in (0, 25):
        with pytest.raises(ValueError, match="1 to 24 tokens"):
            model.new_cache(1, max_length=length)
