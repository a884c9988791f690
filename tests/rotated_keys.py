"""Keys rotated as a model rotates them: shared by the tests of rotary positions."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def angles(positions, pairs, theta=1e4):
    return positions[:, None] * theta ** (-torch.arange(pairs) / pairs)


def rotated(keys, positions):
    """As LLaMA rotates: pairs (j, j + d/2)."""
    turn = angles(positions, keys.shape[-1] // 2)
    cos, sin = (torch.cat([f(turn), f(turn)], dim=-1)[None] for f in (torch.cos, torch.sin))
    queries_and_keys = keys.transpose(0, 1)[None]
    return apply_rotary_pos_emb(queries_and_keys, queries_and_keys, cos, sin)[1][0].transpose(0, 1)
