"""A word tokenizer and tiny random models of every known architecture; nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from adapter_models import BOS, EOS, IMAGE, PAD, VOCABULARY, tiny_llava
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

_SPECIAL = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE, "<unk>": 4}
_WORDS = ["USER:", "ASSISTANT:", "What", "color", "is", "the", "red", "blue", "circle", "square", "?", "\n"]
_WORDS += ["Hint", "says", "Answer", "in", "one", "word", ".", "it"]
_WORDS += [f"w{number}" for number in range(34)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, line break, question mark or period; BOS in front, image placeholder `<image>`."""
    vocabulary = _SPECIAL | {word: number for number, word in enumerate(_WORDS, len(_SPECIAL))}
    assert len(vocabulary) <= VOCABULARY
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[?.]|[^\s?.]+"), "removed", invert=True)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def expanded(ids: list[int], image_tokens: int) -> np.ndarray:
    """Token ids with each image placeholder repeated, as a processor does."""
    return np.repeat(np.array(ids), np.where(np.array(ids) == IMAGE, image_tokens, 1))


def left_padded(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, P]` of unpadded rows."""
    width = max(row.size for row in rows)
    ids = np.stack([np.pad(row, (width - row.size, 0), constant_values=PAD) for row in rows])
    mask = np.stack([np.pad(np.ones_like(row), (width - row.size, 0)) for row in rows])
    return {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask)}


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # attention that is far from uniform
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62}


def _config(family: str) -> PreTrainedConfig:
    clip, siglip = CLIPVisionConfig(**_VISION), SiglipVisionConfig(**_VISION)
    if family == "llava":
        return tiny_llava().config
    if family == "llava_next":
        mistral = MistralConfig(**_TEXT, sliding_window=8)
        return LlavaNextConfig(vision_config=clip, text_config=mistral, image_token_index=IMAGE)
    if family == "llava_onevision":
        return LlavaOnevisionConfig(vision_config=siglip, text_config=Qwen2Config(**_TEXT), image_token_index=IMAGE)
    if family == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
        return Qwen2VLConfig(text_config=_TEXT | _MROPE, vision_config=vision, **_QWEN_IDS)
    if family == "qwen2_5_vl":
        vision = _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=_TEXT | _MROPE, vision_config=vision, **_QWEN_IDS)
    vision = _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLConfig(text_config=_TEXT | _MROPE, vision_config=vision, **_QWEN_IDS)


def family_model(family: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A tiny random model of an architecture that families.py knows: 4 query heads, 2 KV heads, image token 3."""
    config = _config(family)
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()
