"""A head of its own: weights of a tied model never overwrite one another, and an untied one keeps both."""

import pytest
import torch
from families import FAMILIES, family_config, family_model

from tiny_lm.errors import UserError
from tiny_lm.inference.backends.onednn import pack
from tiny_lm.model import build_model
from tiny_lm.model.checkpoint import CHECKPOINT_KEY, load_checkpoint_model
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import build_optimizer


def test_two_matrices_are_not_loaded_into_a_tied_model() -> None:
    model = family_model("gpt2")
    before = model.token_emb.weight.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    for assign in (False, True):
        with pytest.raises(UserError, match="tie_word_embeddings: false"):
            model.load_state_dict(state, assign=assign)
        assert torch.equal(model.token_emb.weight, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_model_keeps_both_matrices(family: str) -> None:
    model = family_model(family, tie_word_embeddings=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(state["lm_head.weight"], state["token_emb.weight"])
    other = build_model(model.config).eval()
    other.load_state_dict(state, assign=True)
    assert other.lm_head.weight is not other.token_emb.weight
    other = other.to(torch.float64).to(torch.float32)
    assert other.lm_head.weight is not other.token_emb.weight
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(ids)
        assert torch.equal(other(ids), expected)
        torch.testing.assert_close(pack(other)(ids), expected, rtol=0, atol=1e-5)
    assert family_config(family).tie_word_embeddings


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_head_is_trained_beside_the_embedding(optimizer: str) -> None:
    model = family_model("llama3", tie_word_embeddings=False)
    built = build_optimizer(model, TrainingConfig(max_steps=1, learning_rate=1e-3, optimizer=optimizer))
    groups = [{id(parameter) for parameter in group["params"]} for group in built.param_groups]
    (together,) = [group for group in groups if id(model.token_emb.weight) in group]
    assert together == {id(model.token_emb.weight), id(model.lm_head.weight)}
    assert sum(map(len, groups)) == len(list(model.parameters()))


def test_a_checkpoint_whose_head_differs_is_refused_unless_its_config_says_so(tmp_path) -> None:
    model = family_model("gpt2", tie_word_embeddings=False)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for tied in (True, False):
        config = {**model.config.to_dict(), "tie_word_embeddings": tied}
        ours = {"model": config, "tokenizer_hash": "0"}
        torch.save({"state_dict": weights, "global_step": 1, CHECKPOINT_KEY: ours}, tmp_path / "x.ckpt")
        if tied:
            with pytest.raises(UserError, match=r"x\.ckpt: the head \(lm_head\.weight\) is not the embedding"):
                load_checkpoint_model(tmp_path / "x.ckpt")
    loaded = load_checkpoint_model(tmp_path / "x.ckpt").model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
