"""The weights of the four families under the names of Hugging Face: one table of tensors per family, read both ways."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.model.config import ModelConfig
from tiny_lm.model.transformer import build_model


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: ours, laid one below the other along dimension 0, then transposed where they want it."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps its matrices as (in, out)


# Names without `{i}` stand once, the others once per block; `*` is weight and bias. A bias that we do not have is zero
# there.
_GPT2_ROWS = (
    Row("transformer.wte.weight", ("token_emb.weight",)),
    Row("transformer.wpe.weight", ("pos_emb.pos_emb.weight",)),
    Row("transformer.h.{i}.ln_1.*", ("blocks.{i}.norm1.*",)),
    Row(
        "transformer.h.{i}.attn.c_attn.*",
        ("blocks.{i}.attn.W_q.*", "blocks.{i}.attn.W_k.*", "blocks.{i}.attn.W_v.*"),
        transposed=True,
    ),
    Row("transformer.h.{i}.attn.c_proj.*", ("blocks.{i}.attn.out_proj.*",), transposed=True),
    Row("transformer.h.{i}.ln_2.*", ("blocks.{i}.norm2.*",)),
    Row("transformer.h.{i}.mlp.c_fc.*", ("blocks.{i}.ffn.fc1.*",), transposed=True),
    Row("transformer.h.{i}.mlp.c_proj.*", ("blocks.{i}.ffn.fc2.*",), transposed=True),
    Row("transformer.ln_f.*", ("final_norm.*",)),
)
_ATTENTION_ROWS = (
    Row("model.embed_tokens.weight", ("token_emb.weight",)),
    Row("model.layers.{i}.input_layernorm.*", ("blocks.{i}.norm1.*",)),
    Row("model.layers.{i}.self_attn.q_proj.*", ("blocks.{i}.attn.W_q.*",)),
    Row("model.layers.{i}.self_attn.k_proj.*", ("blocks.{i}.attn.W_k.*",)),
    Row("model.layers.{i}.self_attn.v_proj.*", ("blocks.{i}.attn.W_v.*",)),
    Row("model.layers.{i}.self_attn.o_proj.*", ("blocks.{i}.attn.out_proj.*",)),
    Row("model.layers.{i}.post_attention_layernorm.*", ("blocks.{i}.norm2.*",)),
    Row("model.norm.*", ("final_norm.*",)),
)
_SMALLLM_ROWS = (
    *_ATTENTION_ROWS,
    Row("model.layers.{i}.mlp.c_fc.*", ("blocks.{i}.ffn.fc1.*",)),
    Row("model.layers.{i}.mlp.c_proj.*", ("blocks.{i}.ffn.fc2.*",)),
)
_LLAMA3_ROWS = (
    *_ATTENTION_ROWS,
    Row("model.layers.{i}.mlp.gate_proj.*", ("blocks.{i}.ffn.w1.*",)),
    Row("model.layers.{i}.mlp.down_proj.*", ("blocks.{i}.ffn.w2.*",)),
    Row("model.layers.{i}.mlp.up_proj.*", ("blocks.{i}.ffn.w3.*",)),
)
_QWEN3_ROWS = (
    *_LLAMA3_ROWS,
    Row("model.layers.{i}.self_attn.q_norm.*", ("blocks.{i}.attn.q_norm.*",)),
    Row("model.layers.{i}.self_attn.k_norm.*", ("blocks.{i}.attn.k_norm.*",)),
)
_ROWS = {"gpt2": _GPT2_ROWS, "smalllm": _SMALLLM_ROWS, "llama3": _LLAMA3_ROWS, "qwen3": _QWEN3_ROWS}

EMBEDDING = {family: table[0].theirs for family, table in _ROWS.items()}
"""Their name of the token embedding, which is the head as well in a tied model."""

HEAD = "lm_head.weight"
"""Their and our name of the head."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Tables that old versions of transformers stored as if they were weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def rows(config: ModelConfig) -> Iterator[Row]:
    """Write out the table of a family: one row per tensor of theirs, no placeholders left."""
    for row in _ROWS[config.architecture]:
        for i in range(config.n_layers) if "{i}" in row.theirs else (0,):
            for kind in ("weight", "bias") if row.theirs.endswith("*") else ("",):
                if kind == "bias" and not _has_bias(config, row.theirs):
                    continue
                names = [name.replace("{i}", str(i)).replace("*", kind) for name in (row.theirs, *row.ours)]
                yield Row(names[0], tuple(names[1:]), row.transposed and kind == "weight")
    if not config.tie_word_embeddings:
        yield Row(HEAD, (HEAD,))


def _has_bias(config: ModelConfig, theirs: str) -> bool:
    if config.architecture in ("gpt2", "smalllm"):
        return True
    if "_proj" in theirs:
        return config.ffn_bias if ".mlp." in theirs else config.qkv_bias
    return False


def to_huggingface_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to theirs, without a tied head, which is the embedding.

    Args:
        config: the config of our model.
        state: our state dict.
    """
    result: dict[str, Tensor] = {}
    for row in rows(config):
        present = [state[name] for name in row.ours if name in state]
        if present:
            joined = torch.cat(present)
            result[row.theirs] = (joined.T if row.transposed else joined).contiguous()
        else:  # a bias that only they have
            weights = [state[name.removesuffix("bias") + "weight"] for name in row.ours]
            result[row.theirs] = weights[0].new_zeros(sum(weight.shape[0] for weight in weights))
    return result


def from_huggingface_state(
    config: ModelConfig, state: Mapping[str, Tensor], *, source: str = "model.safetensors"
) -> dict[str, Tensor]:
    """Convert their state dict to ours.

    Args:
        config: the config of our model.
        state: their state dict; a tied head may be there or not.
        source: what an error names as the place.

    Raises:
        UserError: a tensor is missing, has another shape, has no place in our model, or a tied head is not the
            embedding.
    """
    wanted = {name: tensor.shape for name, tensor in build_model(config, device="meta").state_dict().items()}
    rest = _with_prefix(config, state)
    embedding = rest.get(EMBEDDING[config.architecture])
    head = rest.pop(HEAD, embedding) if config.tie_word_embeddings else embedding
    result: dict[str, Tensor] = {}
    for row in rows(config):
        tensor = rest.pop(row.theirs, None)
        names = [name for name in row.ours if name in wanted]
        if tensor is None:
            raise UserError(f"{source}: the tensor {row.theirs} is missing")
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{source}: {row.theirs} is stored as {str(tensor.dtype).removeprefix('torch.')}; weights are read as "
                "float32, float16, bfloat16 or float64"
            )
        if not names:
            if tensor.any():
                raise UserError(f"{source}: {row.theirs} is not zero, but our {config.architecture} has no such bias")
            continue
        joined = tensor.T if row.transposed else tensor
        lengths = [wanted[name][0] for name in names]
        expected = (sum(lengths), *wanted[names[0]][1:])
        if joined.shape != expected:
            shape = expected[::-1] if row.transposed else expected
            raise UserError(
                f"{source}: {row.theirs} has the shape {tuple(tensor.shape)}, but the config says {tuple(shape)}"
            )
        parts = torch.split(joined, lengths)
        result |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    if rest:
        raise UserError(f"{source}: there is no place for the tensor {shorten(min(rest))} in our {config.architecture}")
    assert head is not None and embedding is not None  # the embedding is in the table of every family
    if head is not embedding and not torch.equal(head, embedding):
        raise UserError(
            f"{source}: the head is not the embedding, though config.json has tie_word_embeddings true; "
            "set it to false there to keep both"
        )
    if config.tie_word_embeddings:
        result[HEAD] = result["token_emb.weight"]
    return result


def _with_prefix(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each name the prefix of the whole model, which files of a bare model lack; leave out tables."""
    embedding = EMBEDDING[config.architecture]
    prefix = embedding.partition(".")[0] + "."
    bare = embedding not in state and embedding.removeprefix(prefix) in state
    return {
        prefix + name if bare and name != HEAD else name: tensor
        for name, tensor in state.items()
        if not name.endswith(_BUFFERS)
    }
