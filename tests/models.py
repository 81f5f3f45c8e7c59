"""Tiny random models of many families, checkpoints of them and text, for the tests of the core.

modality = LanguageModality.load(ModelSpec(source=str(write_checkpoint("llama", folder))), cpu)
batches = modality.calibration_batches(write_text(file), CalibrationSpec(samples=4, length=16))
"""

import random
from pathlib import Path
from typing import Any, Literal

import torch

from infra.specs import DataSpec, ModelSpec
from modalities.language import LanguageModality

VOCAB = 260  # every byte, BOS, and some to spare
BOS = 256
CONTEXT = 128
LAYERS = 3

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": BOS,
    "pad_token_id": None,
    "initializer_range": 0.1,  # so that pruning is felt
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


def tokenizer(*, bos: bool = True) -> Any:
    """One token per byte; texts begin with BOS where `bos` says so."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": BOS}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def write_checkpoint(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, bos: bool = True
) -> Path:
    """A checkpoint as a user has it."""
    build(family, dtype).save_pretrained(folder)
    tokenizer(bos=bos).save_pretrained(folder)
    return folder


def write_wide(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A llama whose rows are whole groups of 128, as weights of few bits want them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **_BASE | sizes)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, paragraphs: int = 160) -> DataSpec:
    """Paragraphs of words, some of them not ASCII, dealt out to the three splits."""
    chance = random.Random(0)
    words = ["model", "weight", "größe", "δ", "and", "of", "pruned", "数", "layer", "🙂", "depth"]
    texts = [" ".join(chance.choices(words, k=12)) for _ in range(paragraphs)]
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return DataSpec(source=str(file))


def load(folder: Path, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> Any:
    """The checkpoint in a folder, as a trial loads it."""
    return LanguageModality.load(ModelSpec(source=str(folder), dtype=dtype), torch.device("cpu"))
