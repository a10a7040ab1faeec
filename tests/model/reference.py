"""Our models beside those of transformers: configs and state dicts in both directions, from one table per family."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_lm.model import ModelConfig


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: ours, laid one below the other along dimension 0, then transposed where they want it."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps its matrices as (in, out)


# Names without `{i}` stand once, the others once per block; `*` is weight and bias. A bias that we do not have is zero
# there.
GPT2_ROWS = (
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
SMALLLM_ROWS = (
    *_ATTENTION_ROWS,
    Row("model.layers.{i}.mlp.c_fc.*", ("blocks.{i}.ffn.fc1.*",)),
    Row("model.layers.{i}.mlp.c_proj.*", ("blocks.{i}.ffn.fc2.*",)),
)
LLAMA3_ROWS = (
    *_ATTENTION_ROWS,
    Row("model.layers.{i}.mlp.gate_proj.*", ("blocks.{i}.ffn.w1.*",)),
    Row("model.layers.{i}.mlp.down_proj.*", ("blocks.{i}.ffn.w2.*",)),
    Row("model.layers.{i}.mlp.up_proj.*", ("blocks.{i}.ffn.w3.*",)),
)
QWEN3_ROWS = (
    *LLAMA3_ROWS,
    Row("model.layers.{i}.self_attn.q_norm.*", ("blocks.{i}.attn.q_norm.*",)),
    Row("model.layers.{i}.self_attn.k_norm.*", ("blocks.{i}.attn.k_norm.*",)),
)
ROWS = {"gpt2": GPT2_ROWS, "smalllm": SMALLLM_ROWS, "llama3": LLAMA3_ROWS, "qwen3": QWEN3_ROWS}


def rows(config: ModelConfig) -> Iterator[Row]:
    """Write out the table of a family: one row per tensor, no placeholders left."""
    for row in ROWS[config.architecture]:
        for i in range(config.n_layers) if "{i}" in row.theirs else (0,):
            for kind in ("weight", "bias") if row.theirs.endswith("*") else ("",):

                def name(text: str, i: int = i, kind: str = kind) -> str:
                    return text.replace("{i}", str(i)).replace("*", kind)

                transposed = row.transposed and kind == "weight"
                yield Row(name(row.theirs), tuple(name(ours) for ours in row.ours), transposed)


def to_reference(config: ModelConfig, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to theirs.

    Args:
        config: the config of our model.
        state: our state dict.
        wanted: their state dict, for its keys and the shapes of biases that we do not have.
    """
    result = {"lm_head.weight": state["lm_head.weight"]}
    for row in rows(config):
        present = [state[name] for name in row.ours if name in state]
        if row.theirs not in wanted:
            assert not present, f"{row.theirs} has no place for {row.ours}"
        elif not present:
            result[row.theirs] = torch.zeros_like(wanted[row.theirs])
        else:
            joined = torch.cat(present)
            result[row.theirs] = (joined.T if row.transposed else joined).contiguous()
    return result


def from_reference(config: ModelConfig, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert their state dict to ours.

    Args:
        config: the config of our model.
        state: their state dict.
        wanted: our state dict, for its keys and shapes.
    """
    result = {"lm_head.weight": state["lm_head.weight"]}
    for row in rows(config):
        names = [name for name in row.ours if name in wanted]
        if row.theirs not in state:
            assert not names, f"{row.theirs} is missing"
        elif not names:
            assert not state[row.theirs].any(), f"there is no place for {row.theirs}"
        else:
            joined = state[row.theirs].T if row.transposed else state[row.theirs]
            parts = joined.split([wanted[name].shape[0] for name in names])
            result.update({name: part.contiguous() for name, part in zip(names, parts, strict=True)})
    return result


def reference_model(config: ModelConfig) -> torch.nn.Module:
    """Build the model of transformers that stands for ``config``, in evaluation mode, with its own random weights."""
    import transformers as hf

    shared: dict[str, Any] = {"vocab_size": config.vocab_size, "tie_word_embeddings": True}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if config.architecture == "gpt2":
        sizes = {"n_positions": config.context_length, "n_embd": config.d_model, "n_inner": config.ffn_size}
        counts = {"n_layer": config.n_layers, "n_head": config.n_heads}
        rest = {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": config.norm_eps}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**shared, **ids, **sizes, **counts, **rest)).eval()
    shared |= {
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **ids,
    }
    if config.architecture == "smalllm":
        rest = {"use_bias": True, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": config.norm_eps}
        return hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**shared, **rest, sliding_window=None)).eval()
    shared |= {
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "hidden_act": "silu",
    }
    if config.architecture == "llama3":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**shared, mlp_bias=config.ffn_bias)).eval()
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**shared, use_sliding_window=False)).eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a value that matters: norms around 1, everything else well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
