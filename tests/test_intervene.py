"""Interventions in a model: what they do to keys and scores, where their statistics come from, and how they go away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import IMAGE, batch, prompt, tiny_llava
from models import family_model
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.intervene.boost import FIRST_LAYER, VisualBoost
from lmms_keyspace.intervene.keys import AffineMap, KeyMaps, affine_maps
from lmms_keyspace.intervene.moments import Moments
from lmms_keyspace.intervene.spec import Spec, parse


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("mean_shift:runs/a", Spec("mean_shift", "runs/a", None)),
        ("random_shift:C:/runs", Spec("random_shift", "C:/runs", None)),
        ("visual_boost", Spec("visual_boost", None, 0.2)),
        ("visual_boost:0.5", Spec("visual_boost", None, 0.5)),
    ],
)
def test_the_argument_is_read(text: str, spec: Spec) -> None:
    assert parse(text) == spec


@pytest.mark.parametrize(
    "text", ["", "shift:runs", "mean_shift", "mean_shift:", "visual_boost:", "visual_boost:0", "visual_boost:nan"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert caught.value.argument == "intervene"


def moments(seed: int = 0, heads: int = 2, width: int = 8) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, heads, width, generator=generator)
    return Moments(drawn[0], drawn[1], drawn[2].abs(), drawn[3].abs())


def test_the_maps_do_what_they_are_named_for() -> None:
    """Checked on keys whose moments are exactly the given ones."""
    generator = torch.Generator().manual_seed(1)
    visual, text = (torch.randn(500, 2, 8, generator=generator) * s + o for s, o in ((2.0, 3.0), (0.5, -1.0)))
    found = Moments(visual.mean(0), text.mean(0), visual.std(0), text.std(0))
    shift = found.mean_text - found.mean_visual

    mean = affine_maps("mean_shift", {0: found}, 0)[0]
    moved = mean.scale * visual + mean.offset
    torch.testing.assert_close(moved.mean(0), text.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.std(0), visual.std(0), rtol=1e-4, atol=1e-4)

    matched = affine_maps("moment_matching", {0: found}, 0)[0]
    moved = matched.scale * visual + matched.offset
    torch.testing.assert_close(moved.mean(0), text.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.std(0), text.std(0), rtol=1e-4, atol=1e-4)

    random = affine_maps("random_shift", {0: found, 1: found}, 0)
    assert torch.equal(random[0].scale, torch.ones(2, 8))
    torch.testing.assert_close(random[0].offset.norm(dim=-1), shift.norm(dim=-1))
    assert not torch.equal(random[0].offset, random[1].offset)
    assert torch.equal(random[0].offset, affine_maps("random_shift", {0: found}, 0)[0].offset)
    assert not torch.equal(random[0].offset, affine_maps("random_shift", {0: found}, 1)[0].offset)


def test_a_coordinate_that_never_varies_is_not_divided_by_zero() -> None:
    found = moments()
    found.sd_visual[0, 0] = 0
    mapped = affine_maps("moment_matching", {0: found}, 0)[0]
    assert torch.isfinite(mapped.scale).all()
    assert mapped.scale[0, 0] == 1


def prompts() -> dict[str, Tensor]:
    return batch(prompt("image", 10, 11), prompt(20, 21, "image", 22, 23, 24), prompt("image", 30, "image", 31))


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "llava_phi3", "qwen3_5"])
def test_maps_move_visual_keys_and_nothing_else(family: str) -> None:
    model = tiny_llava() if family == "llava" else family_model(family)
    decoder = decoder_sites(model)
    maps = {
        site.layer: AffineMap(*(torch.randn(site.n_kv_heads, site.head_dim) for _ in range(2)))
        for site in decoder.sites
    }
    site = decoder.sites[0]
    seen: list[Tensor] = []
    call: dict[str, Any] = batch(prompt(10, "image", 11, 12))
    ids = call["input_ids"]
    embeddings = {"input_ids": ids} if family != "llava" else call  # without pixels, placeholders are words
    before = site.key_module.register_forward_hook(lambda _m, _a, out: seen.append(site.keys(out).clone()))
    logits(model, embeddings)
    before.remove()
    change = KeyMaps(decoder, maps)
    after = site.key_module.register_forward_hook(lambda _m, _a, out: seen.append(site.keys(out).clone()))
    logits(model, embeddings)
    visual = ids == IMAGE
    mapped = maps[site.layer].scale * seen[0] + maps[site.layer].offset
    torch.testing.assert_close(seen[1], torch.where(visual[..., None, None], mapped, seen[0]))
    with change.disabled():
        logits(model, embeddings)
    assert torch.equal(seen[2], seen[0])
    change.remove()
    logits(model, embeddings)
    assert torch.equal(seen[3], seen[0])
    after.remove()


def test_cached_decoding_equals_teacher_forcing_under_a_shift() -> None:
    model, inputs = tiny_llava(), prompts()
    maps = affine_maps("mean_shift", {layer: moments(layer) for layer in range(3)}, 0)
    plain = logits(model, inputs)
    KeyMaps(decoder_sites(model), maps)
    assert not torch.allclose(logits(model, inputs), plain, atol=1e-3)
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    forced = inputs | {
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
    }
    torch.testing.assert_close(torch.stack(out.logits, 1), logits(model, forced)[:, -5:-1], rtol=1e-4, atol=1e-4)


def boosted_by_hand(model: torch.nn.Module, inputs: dict[str, Tensor], alpha: float) -> Tensor:
    """Logits of the last token from eager attention whose scores are raised by a hook on its softmax."""
    visual = inputs["input_ids"] == IMAGE
    layer = iter(range(100))
    original = torch.nn.functional.softmax

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.dim() == 4 and scores.shape[-1] == visual.shape[1] and next(layer) >= FIRST_LAYER:
            scores = scores.clone()
            newest = scores[:, :, -1]
            scores[:, :, -1] = torch.where(visual[:, None], newest + alpha * newest.abs(), newest)
        return original(scores, *args, **kwargs)

    torch.nn.functional.softmax = softmax
    try:
        return logits(model, inputs)[:, -1]
    finally:
        torch.nn.functional.softmax = original


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_boost_is_the_formula(implementation: str) -> None:
    inputs = prompts()
    eager = tiny_llava()
    eager.set_attn_implementation("eager")
    eager.model.vision_tower.set_attn_implementation("sdpa")
    plain, expected = logits(eager, inputs)[:, -1], boosted_by_hand(eager, inputs, 0.5)
    assert (expected - plain).abs().max() > 1e-3
    model = tiny_llava()
    model.set_attn_implementation(implementation)
    change = VisualBoost(decoder_sites(model), 0.5)
    torch.testing.assert_close(logits(model, inputs)[:, -1], expected, rtol=1e-4, atol=1e-4)
    with change.disabled():
        torch.testing.assert_close(logits(model, inputs)[:, -1], plain, rtol=1e-4, atol=1e-4)
    change.remove()
    torch.testing.assert_close(logits(model, inputs)[:, -1], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # gemma3: a sliding window in one layer
def test_a_boost_of_nothing_is_nothing_while_decoding(family: str) -> None:
    model = tiny_llava() if family == "llava" else family_model(family)
    inputs = prompts() if family == "llava" else batch(prompt(10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    plain = model.generate(**inputs, **settings, return_dict_in_generate=True)
    change = VisualBoost(decoder_sites(model), 1e-9)
    again = model.generate(**inputs, **settings, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    change.remove()
    if family == "llava":
        stronger = VisualBoost(decoder_sites(model), 2.0)
        raised = model.generate(**inputs, **settings, return_dict_in_generate=True)
        assert (torch.stack(raised.logits) - torch.stack(plain.logits)).abs().max() > 1e-2
        stronger.remove()


def test_decoding_raises_every_new_token() -> None:
    """Only the last layer is boosted, so the cache is that of the plain model, and one step more with it is the last
    token of one call on everything."""
    assert FIRST_LAYER == 2
    eager, model, inputs = tiny_llava(), tiny_llava(), prompts()
    eager.set_attn_implementation("eager")
    token = torch.full((3, 1), 40)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], token], dim=1), "attention_mask": mask}
    change = VisualBoost(decoder_sites(model), 0.5)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, boosted_by_hand(eager, whole, 0.5), rtol=1e-4, atol=1e-4)
    change.remove()
