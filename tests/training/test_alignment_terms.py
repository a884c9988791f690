"""Which tokens enter the terms, and that the terms are those of `divergence`."""

from __future__ import annotations

import pytest
import torch
from adapter_models import EOS, IMAGE, SPECIAL_IDS, batch, prompt, tiny_llava
from peft import PeftModel, get_peft_model

from lmms_keyspace import divergence
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig
from lmms_keyspace.malora.taps import key_taps, tapped
from lmms_keyspace.training.alignment import TokenChooser, alignment_terms, calibrate, mean_over_layers, summed_gates
from lmms_keyspace.training.config import LossConfig

PROMPTS = [prompt("image", 10, 11, 12, EOS), prompt(20, "image", 21), prompt("image", 30, 31, 32, 33, 34)]


def chooser(max_tokens: int = 128, seed: int = 0) -> TokenChooser:
    return TokenChooser([IMAGE], SPECIAL_IDS, max_tokens, seed)


def adapted(random: bool = True) -> PeftModel:
    base = tiny_llava()
    base.model.multi_modal_projector.linear_2.bias.data += 1  # visual and text keys lie apart, as in a real model
    torch.manual_seed(0)
    return get_peft_model(base, MaloraConfig(r=4, init_weights=not random))


def names(sides, inputs, ids) -> list[list[tuple[int, int]]]:
    """The chosen tokens as (example, place after the padding), by slot."""
    width = inputs["input_ids"].shape[1]
    before = inputs["attention_mask"].argmax(dim=1)  # padding on the left
    rows = [[(int(ids[t // width]), int(t % width - before[t // width])) for t in side.tokens] for side in sides]
    for row, side in zip(rows, sides, strict=True):
        assert side.slots.tolist() == list(range(side.n)) == list(range(len(row)))
    return rows


@pytest.mark.parametrize("max_tokens", [4, 128])
def test_the_choice_depends_on_neither_order_nor_padding(max_tokens: int) -> None:
    choose = chooser(max_tokens)
    ids = torch.tensor([5, 9, 2])
    inputs = batch(*PROMPTS)
    chosen = names(choose.choose(inputs, ids, 3), inputs, ids)
    assert len(chosen[0]) == len(chosen[1]) == min(max_tokens, 10)
    turned = batch(*PROMPTS[::-1])
    assert names(choose.choose(turned, ids.flip(0), 3), turned, ids.flip(0)) == chosen
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in inputs.items() if name != "pixel_values"}
    assert names(choose.choose(wider, ids, 3), wider, ids) == chosen
    if max_tokens == 4:
        assert names(choose.choose(inputs, ids, 4), inputs, ids) != chosen
        assert names(chooser(max_tokens, seed=1).choose(inputs, ids, 3), inputs, ids) != chosen


def test_special_tokens_and_padding_are_never_chosen() -> None:
    inputs = batch(*PROMPTS)
    visual, text = chooser().choose(inputs, torch.arange(3), 0)
    ids = inputs["input_ids"].flatten()
    assert (ids[visual.tokens] == IMAGE).all()
    assert not set(ids[text.tokens].tolist()) & {IMAGE, *SPECIAL_IDS}


def test_the_terms_are_those_of_the_captured_keys() -> None:
    model = adapted().eval()
    inputs, ids = batch(*PROMPTS), torch.arange(3)
    taps = key_taps(model)
    bandwidth2 = calibrate(model, taps, [(inputs, ids)], chooser())
    with tapped(taps):
        model(**inputs)
    sides = chooser().choose(inputs, ids, 0)
    terms = alignment_terms(taps, sides, LossConfig(), bandwidth2)
    flat = [side.tokens for side in sides]
    for tap in taps:
        visual, text = (tap.keys.flatten(0, 1)[tokens].transpose(0, 1).detach() for tokens in flat)
        expected = divergence.mmd2(visual, text, bandwidth2=bandwidth2[tap.layer]).mean()
        assert terms.mmd2[tap.layer].item() == pytest.approx(expected, abs=1e-5)
    assert mean_over_layers(terms.gram) > 0
    gates = summed_gates(taps, sides)
    assert gates is not None
    assert gates[:, 1].tolist() == [side.n for side in sides]
    assert not any(gate.item() == pytest.approx(0.5) for gate in gates[:, 0] / gates[:, 1])


def test_a_fresh_adapter_changes_no_key() -> None:
    model = adapted(random=False).eval()
    inputs, ids = batch(*PROMPTS), torch.arange(3)
    taps = key_taps(model)
    bandwidth2 = calibrate(model, taps, [(inputs, ids)], chooser())
    with tapped(taps):
        model(**inputs)
    terms = alignment_terms(taps, chooser().choose(inputs, ids, 0), LossConfig(), bandwidth2)
    assert mean_over_layers(terms.gram).item() == 0
    assert [ratio.item() for ratio in terms.key_norm_ratio] == [1, 1]


@pytest.mark.parametrize(("weight", "acts"), [(0.0, False), (0.5, True)])
def test_a_term_without_weight_is_measured_and_does_not_act(weight: float, acts: bool) -> None:
    model = adapted()
    inputs, ids = batch(*PROMPTS), torch.arange(3)
    taps = key_taps(model)
    bandwidth2 = calibrate(model, taps, [(inputs, ids)], chooser())
    with tapped(taps):
        model(**inputs)
    loss = LossConfig(lambda_mmd=weight, lambda_gram=weight)
    terms = alignment_terms(taps, chooser().choose(inputs, ids, 0), loss, bandwidth2)
    assert all(value.requires_grad == acts for value in [*terms.mmd2.values(), *terms.gram.values()])


def test_a_batch_with_one_modality() -> None:
    model = adapted()
    inputs, ids = batch(prompt(10, 11), prompt(12, 13)), torch.arange(2)
    taps = key_taps(model)
    with pytest.raises(InputError, match="visual and text"):
        calibrate(model, taps, [(inputs, ids)], chooser())
    with tapped(taps):
        model(**inputs)
    with pytest.raises(InputError, match="lambda_mmd"):
        alignment_terms(taps, chooser().choose(inputs, ids, 0), LossConfig(), {})
