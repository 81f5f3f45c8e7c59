"""Tiny random vision-language models of many families, with processors made here, not fetched.

folder = write_checkpoint("llava", tmp_path / "llava")
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import tokenizer as byte_tokenizer

SIZE, PATCH = 16, 8  # 4 patches an image
_SPECIAL = [
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
]
VOCAB = 257 + len(_SPECIAL) + 5  # <pad> and <eos>, and some to spare
LAYERS = 2
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 257,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.15,
}
CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(image_token: str | None = "<image>", **extra: str) -> Any:
    """Bytes, BOS and the special tokens of all families."""
    from transformers import PreTrainedTokenizerFast

    backend = byte_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<pad>", "<eos>", *_SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=({"image_token": image_token} if image_token else {}) | extra,
    )


def _id(token: str) -> int:
    return int(tokenizer().convert_tokens_to_ids(token))


def _config(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **options)


def _images(kind: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(**options)


def _square(kind: str = "CLIPImageProcessor", **options: Any) -> Any:
    size = {"height": SIZE, "width": SIZE}
    return _images(kind, size=size, crop_size=size, **options)


def _llava() -> tuple[Any, Any]:
    from transformers import LlavaProcessor

    config = _config(
        "llava",
        vision_config=_config("clip_vision_model", **_VISION),
        text_config=_config("llama", **_TEXT),
        image_token_index=_id("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        _square(),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("IMAGE", "<image>"),
        num_additional_image_tokens=1,
    )
    return config, processor


def _llava_next() -> tuple[Any, Any]:
    from transformers import LlavaNextProcessor

    pinpoints = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    config = _config(
        "llava_next",
        vision_config=_config("clip_vision_model", **_VISION),
        text_config=_config("mistral", **_TEXT),
        image_token_index=_id("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    size = {"size": {"height": SIZE, "width": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    processor = LlavaNextProcessor(
        _images("LlavaNextImageProcessor", image_grid_pinpoints=pinpoints, **size),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def _idefics3(kind: str = "idefics3") -> tuple[Any, Any]:
    from transformers import Idefics3Processor

    config = _config(
        kind,
        vision_config=_config(f"{kind}_vision", **_VISION),
        text_config=_config("llama", **_TEXT),
        image_token_id=_id("<image>"),
        scale_factor=2,
        pad_token_id=257,
    )
    images = _images(
        "Idefics3ImageProcessor",
        size={"longest_edge": 2 * SIZE},
        max_image_size={"longest_edge": SIZE},
    )
    words = tokenizer(
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    chat = CHAT.replace("IMAGE", "<image>")
    # SmolVLM's own processor is this one with videos, for which it wants another package.
    return config, Idefics3Processor(images, words, chat_template=chat, image_seq_len=1)


_MRoPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen(kind: str = "qwen2_vl") -> tuple[Any, Any]:
    import transformers

    vision: dict[str, Any] = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.15,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        }
    config = _config(
        kind,
        vision_config=vision,
        text_config=_TEXT | {"rope_parameters": _MRoPE, "rope_scaling": _MRoPE, "head_dim": 8},
        image_token_id=_id("<|image_pad|>"),
        video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"),
        vision_end_token_id=_id("<|vision_end|>"),
    )
    size = {"size": {"shortest_edge": 32 * 32, "longest_edge": 48 * 48}, "patch_size": PATCH}
    name = {"qwen2_vl": "Qwen2VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
    video = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[kind]
    processor = getattr(transformers, name)(
        _images("Qwen2VLImageProcessor", **size),
        tokenizer("<|image_pad|>"),
        getattr(transformers, video)(),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    from transformers import PaliGemmaProcessor

    config = _config(
        "paligemma",
        vision_config=_config("siglip_vision_model", **_VISION),
        text_config=_config("gemma", **_TEXT, head_dim=8),
        image_token_index=_id("<image>"),
        projection_dim=32,
    )
    images = _images("SiglipImageProcessor", size={"height": SIZE, "width": SIZE})
    images.image_seq_length = 4
    return config, PaliGemmaProcessor(images, tokenizer())


def _blip2() -> tuple[Any, Any]:
    from transformers import Blip2Processor

    former = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "encoder_hidden_size": 24,
        "initializer_range": 0.15,
    }
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
        "init_std": 0.15,
    }
    config = _config(
        "blip-2",
        vision_config=_VISION,
        qformer_config=former,
        text_config=_config("opt", **text).to_dict(),
        num_query_tokens=3,
        image_token_index=_id("<image>"),
    )
    images = _images("BlipImageProcessor", size={"height": SIZE, "width": SIZE})
    return config, Blip2Processor(images, tokenizer(None), num_query_tokens=3)


def _clip() -> tuple[Any, Any]:
    from tokenizers import processors
    from transformers import CLIPProcessor

    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    config = _config(
        "clip",
        vision_config=_VISION,
        text_config=text | {"max_position_embeddings": 64},
        projection_dim=16,
    )
    words = tokenizer()
    ends = [("<s>", 256), ("<eos>", 258)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <eos>", special_tokens=ends
    )
    return config, CLIPProcessor(_square(), words)


def _encoder_decoder() -> tuple[Any, Any]:
    from transformers import TrOCRProcessor, VisionEncoderDecoderConfig

    ends = {"bos_token_id": 256, "eos_token_id": 258}
    decoder = {k: v for k, v in _TEXT.items() if k in ("vocab_size", "initializer_range")}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        _config("vit", **_VISION),
        _config("gpt2", n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, **decoder, **ends),
    )
    config.decoder_start_token_id = 256
    config.pad_token_id = 257
    images = _images("ViTImageProcessor", size={"height": SIZE, "width": SIZE})
    return config, TrOCRProcessor(images, tokenizer())


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava-next": _llava_next,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("smolvlm"),
    "qwen2-vl": _qwen,
    "qwen3-vl": lambda: _qwen("qwen3_vl"),
    "paligemma": _paligemma,
    "blip-2": _blip2,
    "clip": _clip,
    "encoder-decoder": _encoder_decoder,
}


def build(family: str) -> tuple[Any, Any]:
    """A random model and its processor, the same every time."""
    import transformers
    from transformers import AutoModelForImageTextToText, CLIPModel

    config, processor = FAMILIES[family]()
    torch.manual_seed(0)
    if family == "clip":
        return CLIPModel(config).eval(), processor
    if family == "encoder-decoder":
        return transformers.VisionEncoderDecoderModel(config).eval(), processor
    return AutoModelForImageTextToText.from_config(config).eval(), processor


def write_checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint as a user has it."""
    model, processor = build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
