"""A word tokenizer, and a tiny random model and processor of every known architecture; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from adapter_models import BOS, EOS, IMAGE, PAD, VOCABULARY, tiny_llava
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics2Config,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    Phi3Config,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)

_SPECIAL = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE, "<unk>": 4}
_WORDS = ["USER:", "ASSISTANT:", "What", "color", "is", "the", "red", "blue", "circle", "square", "?", "\n"]
_WORDS += ["Hint", "says", "Answer", "in", "one", "word", ".", "it"]
_WORDS += [f"w{number}" for number in range(34)]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word, line break, question mark or period; BOS in front, image placeholder `<image>`.

    Args:
        special: further special tokens by attribute, such as image_token="<image>".
    """
    vocabulary = _SPECIAL | {word: number for number, word in enumerate(_WORDS, len(_SPECIAL))}
    assert len(vocabulary) <= VOCABULARY
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[?.]|[^\s?.]+"), "removed", invert=True)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=special,
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
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


TEXT = {
    "vocab_size": 128,
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
_HYBRID = {  # one layer of linear attention, then one of full attention; RoPE turns half of each head
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    },
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
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
_QWEN3_VISION = _QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_SQUARE = {"height": 8, "width": 8}
_PINPOINTS = [[8, 16], [16, 8], [16, 16]]
# Special tokens of the processors, under the ids that follow the words.
_QWEN_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<vision_start>",
    "vision_end_token": "<vision_end>",
}
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "video_token": "<video>",
}
_GEMMA_TOKENS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
_IDEFICS_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
} | {f"row_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
_PIXTRAL_TOKENS = {"break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}
_TOKENS = {
    "internvl": _INTERNVL_TOKENS,
    "gemma3": _GEMMA_TOKENS,
    "mistral3": _PIXTRAL_TOKENS,
    "idefics2": {"image_boundary_token": "<fake_token_around_image>", "image_token": "<image>"},
    "idefics3": _IDEFICS_TOKENS,
    "smolvlm": _IDEFICS_TOKENS,
}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The word tokenizer with the special tokens of an architecture's processor."""
    return tokenizer(**_TOKENS.get(family, _QWEN_TOKENS if family.startswith("qwen") else {}))


_CHAT = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE \\n {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def placeholder(family: str) -> str:
    """What stands for an image in the architecture's prompts."""
    if family.startswith("qwen"):
        return "<vision_start><image><vision_end>"
    return {"gemma3": "<boi>"}.get(family, "<image>")


def _config(family: str) -> PreTrainedConfig:
    clip, siglip = CLIPVisionConfig(**_VISION), SiglipVisionConfig(**_VISION)
    llama, mistral = LlamaConfig(**TEXT), MistralConfig(**TEXT, sliding_window=8)
    ids = family_tokenizer(family).convert_tokens_to_ids
    qwen_ids = {f"{name}_id": ids(token) for name, token in _QWEN_TOKENS.items()}
    match family:
        case "llava":
            return tiny_llava(vocab_size=128).config
        case "llava_phi3":  # a fused query-key-value projection; RoPE turns half of each head
            config = tiny_llava().config
            config.text_config = Phi3Config(**TEXT | {"partial_rotary_factor": 0.5})
            return config
        case "vipllava":
            return VipLlavaConfig(
                vision_config=clip, text_config=llama, image_token_index=IMAGE, vision_feature_layers=[-1] * 5
            )
        case "aya_vision":  # Cohere 2: no RoPE in layers with full attention
            text = Cohere2Config(**TEXT, layer_types=["sliding_attention", "full_attention"])
            return AyaVisionConfig(vision_config=siglip, text_config=text, image_token_index=IMAGE)
        case "llava_next":
            return LlavaNextConfig(
                vision_config=clip, text_config=mistral, image_token_index=IMAGE, image_grid_pinpoints=_PINPOINTS
            )
        case "llava_onevision":
            return LlavaOnevisionConfig(
                vision_config=siglip,
                text_config=Qwen2Config(**TEXT),
                image_token_index=IMAGE,
                image_grid_pinpoints=_PINPOINTS,
            )
        case "qwen2_vl":
            vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
            return Qwen2VLConfig(text_config=TEXT | _MROPE, vision_config=vision, **qwen_ids)
        case "qwen2_5_vl":
            vision = _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
            return Qwen2_5_VLConfig(text_config=TEXT | _MROPE, vision_config=vision, **qwen_ids)
        case "qwen3_vl":
            return Qwen3VLConfig(text_config=TEXT | _MROPE, vision_config=_QWEN3_VISION, **qwen_ids)
        case "qwen3_5":
            return Qwen3_5Config(text_config=TEXT | _HYBRID, vision_config=_QWEN3_VISION, **qwen_ids)
        case "internvl":
            vision = _VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
            return InternVLConfig(
                vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
            )
        case "gemma3":
            text = TEXT | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
            return Gemma3Config(
                vision_config=siglip,
                text_config=text | {"query_pre_attn_scalar": 16},
                mm_tokens_per_image=4,
                boi_token_index=ids("<boi>"),
                eoi_token_index=ids("<eoi>"),
                image_token_index=IMAGE,
            )
        case "mistral3":
            vision = PixtralVisionConfig(**_VISION | {"image_size": 32, "hidden_act": "silu"})
            return Mistral3Config(vision_config=vision, text_config=mistral, image_token_index=IMAGE)
        case "idefics2":
            perceiver = {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
            }
            return Idefics2Config(
                vision_config=_VISION,
                perceiver_config=perceiver | {"num_key_value_heads": 1, "hidden_size": 64},
                text_config=mistral,
                image_token_id=IMAGE,
            )
        case "idefics3":
            return Idefics3Config(vision_config=_VISION, text_config=llama, image_token_id=IMAGE, scale_factor=1)
        case "smolvlm":
            return SmolVLMConfig(vision_config=_VISION, text_config=llama, image_token_id=IMAGE, scale_factor=1)
    assert family == "instructblip"
    qformer = {
        "vocab_size": 128,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 16,
    }
    return InstructBlipConfig(
        vision_config=_VISION | {"initializer_range": 0.2},
        qformer_config=qformer,
        text_config=llama,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def family_model(family: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A tiny random model of an architecture that families.py knows: 4 query heads, 2 KV heads, image token 3.

    `llava_phi3` is a LLaVA with a Phi-3 decoder; `vipllava` and `aya_vision` have no entry.
    """
    config = _config(family)
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # learned queries and projections that start constant
        if parameter.dim() > 1 and parameter.min() == parameter.max():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def picture(number: int) -> Image.Image:
    """Of 12 x 8 or 8 x 16 pixels (width x height), as the families' processors take them."""
    width, height = ((12, 8), (8, 16))[number % 2]
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


def family_processor(family: str) -> ProcessorMixin:
    """The architecture's own processor around the word tokenizer, for pictures of 8 to 16 pixels."""
    words = family_tokenizer(family)
    pixels = {"min_pixels": 64, "max_pixels": 512, "patch_size": 4, "merge_size": 2}
    match family:
        case "llava" | "llava_phi3":
            images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=_SQUARE)
            return LlavaProcessor(images, words, 4, "default", num_additional_image_tokens=1)
        case "llava_next":
            images = LlavaNextImageProcessor(
                size={"shortest_edge": 8}, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS
            )
            return LlavaNextProcessor(images, words, 4, "default", num_additional_image_tokens=1)
        case "llava_onevision":
            images = LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=_PINPOINTS)
            return LlavaOnevisionProcessor(images, words, LlavaOnevisionVideoProcessor(), 4, "full")
        case "qwen2_vl":
            return Qwen2VLProcessor(Qwen2VLImageProcessor(**pixels), words, Qwen2VLVideoProcessor())
        case "qwen2_5_vl":
            return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**pixels), words, Qwen2VLVideoProcessor())
        case "qwen3_vl" | "qwen3_5":
            return Qwen3VLProcessor(Qwen2VLImageProcessor(**pixels), words, Qwen3VLVideoProcessor())
        case "internvl":
            images = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=2)
            return InternVLProcessor(images, words, InternVLVideoProcessor(), 4)
        case "gemma3":
            return Gemma3Processor(Gemma3ImageProcessor(size=_SQUARE), words, image_seq_length=4)
        case "mistral3":
            images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
            return PixtralProcessor(images, words, 4, 2, image_token="<image>")
        case "idefics2":
            images = Idefics2ImageProcessor(size={"longest_edge": 8, "shortest_edge": 8}, do_image_splitting=False)
            return Idefics2Processor(images, words, 4)
        case "idefics3" | "smolvlm":  # SmolVLM's own processor writes the same tokens and needs one more package
            images = Idefics3ImageProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
            return Idefics3Processor(images, words, 4)
    assert family == "instructblip"
    return InstructBlipProcessor(BlipImageProcessor(size=_SQUARE), words, tokenizer(), 4)


def save_checkpoint(family: str, folder: Path) -> Path:
    """Model and processor as wrappers load them, with a chat template where the architecture has one."""
    processor = family_processor(family)
    if family != "instructblip":
        processor.chat_template = _CHAT.replace("IMAGE", placeholder(family))
    family_model(family).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
