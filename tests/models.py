"""Tiny random models of many families, and checkpoints of them, for the tests of the core.

from tests.models import FAMILIES, build, write_checkpoint
write_checkpoint("llama", tmp_path / "llama")
"""

from typing import Any

import torch

VOCAB = 256
CONTEXT = 128
LAYERS = 3

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GQA = _BASE | {"num_key_value_heads": 2}
_MOE = _GQA | {"head_dim": 8, "num_experts_per_tok": 2}
_MIXED = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# transformers' model type and what its configuration is given.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama-tied": ("llama", _GQA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", _GQA | {"head_dim": 8, "sliding_window": 8}),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", _GQA | {"head_dim": 8}),
    "gemma3": ("gemma3_text", _GQA | {"head_dim": 8} | _MIXED),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt-neox": ("gpt_neox", _BASE),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT},
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "phi3": ("phi3", _GQA),
    "olmo2": ("olmo2", _GQA),
    "mixtral": ("mixtral", _MOE | {"num_local_experts": 4}),
    "qwen2-moe": (
        "qwen2_moe",
        _GQA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        _MOE | {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "granite-moe": ("granitemoe", _MOE | {"num_local_experts": 4}),
    "deepseek-v3": (
        "deepseek_v3",
        _BASE
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt-oss": ("gpt_oss", _MOE | {"num_local_experts": 4} | _MIXED),
    "jamba": (
        "jamba",
        _GQA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 2,
            "hidden_size": 64,
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        _MOE
        | {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family, the same one every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = FAMILIES[family]
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()
