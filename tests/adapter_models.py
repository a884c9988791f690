"""Tiny random vision-language models for tests: built from a config in milliseconds, no download, no tokenizer."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
SPECIAL_IDS = (PAD, BOS, EOS)
IMAGE_TOKENS = 4  # per image: 8 x 8 pixels in 4 x 4 patches
IMAGE_SIZE = 8
VOCABULARY = 64


def tiny_llava(seed: int = 0, **text_settings: int) -> LlavaForConditionalGeneration:
    """A random LLaVA in eval mode: CLIP tower, 3 Llama layers, width 32, 4 heads, 2 KV heads.

    Weights are larger than the default start, so that attention is far from uniform and a change of keys shows.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.2,
            **text_settings,
        }
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


def prompt(*parts: int | str) -> list[int]:
    """Token ids with BOS; the word `image` stands for one image's placeholders."""
    return [BOS] + [token for part in parts for token in ([IMAGE] * IMAGE_TOKENS if part == "image" else [int(part)])]


def batch(*prompts: list[int], seed: int = 0, labels: bool = False) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts with one random picture per image; labels are the text tokens."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    result = {"input_ids": input_ids, "attention_mask": attention_mask}
    n_images = int((input_ids == IMAGE).sum()) // IMAGE_TOKENS
    if n_images:
        generator = torch.Generator().manual_seed(seed)
        result["pixel_values"] = torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    if labels:
        result["labels"] = input_ids.masked_fill((input_ids == IMAGE) | (attention_mask == 0), -100)
    return result
