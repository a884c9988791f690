"""A word tokenizer and a tiny random Qwen2.5-VL for the tests of labels and capture; nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from adapter_models import BOS, EOS, IMAGE, PAD, VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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


def tiny_qwen(attn_implementation: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with random weights: three-axis RoPE, 2 layers, 4 query heads on 2 KV heads of width 16."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=60,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )
    config._attn_implementation = attn_implementation
    return Qwen2_5_VLForConditionalGeneration(config).eval()
