"""The sample depends on names and the seed alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import MODALITIES
from lmms_keyspace.sampling import Sampler, mix64
from lmms_keyspace.tokens import TokenLabels

NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=30, unique=True)
POSITIONS = st.lists(st.integers(0, 5000), min_size=1, max_size=60, unique=True)


@given(NAMES, st.integers(1, 20), st.randoms())
def test_clusters_do_not_depend_on_order_or_repeats(names, k, random):
    shuffled = names * 2
    random.shuffle(shuffled)
    chosen = Sampler(0, clusters=k).choose_clusters("task", names)
    assert Sampler(0, clusters=k).choose_clusters("task", shuffled) == chosen
    assert len(chosen) == min(k, len(names))


@given(NAMES, st.integers(1, 20))
def test_fewer_clusters_are_a_subset(names, k):
    assert Sampler(0, clusters=k).choose_clusters("t", names) <= Sampler(0, clusters=k + 1).choose_clusters("t", names)


@given(NAMES, NAMES, st.integers(1, 10))
def test_a_cut_into_ranks_is_contained_in_the_whole(names, others, k):
    """What a rank would choose from its own documents holds everything the whole run chooses from them."""
    sampler = Sampler(0, clusters=k)
    whole = sampler.choose_clusters("t", names + others)
    assert whole <= sampler.choose_clusters("t", names) | sampler.choose_clusters("t", others)


@given(POSITIONS, st.integers(1, 20), st.randoms())
def test_tokens_do_not_depend_on_order_and_nest(positions, k, random):
    shuffled = list(positions)
    random.shuffle(shuffled)
    chosen = Sampler(0, tokens=k).choose_tokens("t", "c", "text", np.array(positions))
    again = Sampler(0, tokens=k).choose_tokens("t", "c", "text", np.array(shuffled))
    assert chosen.tolist() == again.tolist() == sorted(chosen)
    assert set(chosen) <= set(positions)
    assert len(chosen) == min(k, len(positions))
    assert set(chosen) <= set(Sampler(0, tokens=k + 1).choose_tokens("t", "c", "text", np.array(positions)))


@pytest.mark.parametrize("change", ["seed", "task", "cluster", "modality"])
def test_each_name_matters(change):
    names = {"seed": 0, "task": "t", "cluster": "c", "modality": "text"}
    other = names | {change: {"seed": 1}.get(change, "x")}

    def choose(seed, **rest):
        return Sampler(seed, tokens=20).choose_tokens(**rest, positions=np.arange(400)).tolist()

    assert choose(**names) == choose(**names)
    assert choose(**names) != choose(**other)


def test_every_position_is_as_likely_as_another():
    """4,000 documents take 8 of 64 tokens: each position is taken 500 times, with a standard deviation of 21."""
    sampler = Sampler(0, tokens=8)
    counts = np.zeros(64)
    for document in range(4000):
        counts[sampler.choose_tokens("t", f"c{document}", "visual", np.arange(64))] += 1
    assert abs(counts - 500).max() < 5 * 21
    assert counts.std() < 2 * 21


def test_the_hash_is_splitmix64():
    """First output of the published generator for seed 0."""
    assert int(mix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_the_sample_is_the_same_in_every_version():
    """Pinned: a change of the hash would unpair runs made before and after it."""
    sampler = Sampler(1234, clusters=4, tokens=4)
    chosen = sampler.choose_clusters("mmmu_val", [f"doc{n}" for n in range(50)])
    assert chosen == {"doc0", "doc28", "doc35", "doc44"}
    assert sampler.choose_tokens("mmmu_val", "doc0", "visual", np.arange(576)).tolist() == [12, 164, 379, 409]


def labels(modality):
    size = len(modality)
    empty = np.full(size, -1)
    codes = np.array([MODALITIES.index(name) for name in modality])
    return TokenLabels(codes, np.zeros(size, np.int8), empty, empty, empty)


def test_the_sampled_rows_are_the_same_on_every_machine():
    """Pinned from names to token ids: task, document, condition, position, token, as the table of tokens has them."""
    sampler, task = Sampler(0, clusters=8, tokens=6), "textbias_probe"
    conditions = {"clean": 20, "conflict": 33}  # tokens after the image
    digest = hashlib.sha256()
    for cluster in sorted(sampler.choose_clusters(task, [f"scene-{n}" for n in range(40)])):
        for condition, n_text in conditions.items():
            modality = ["bos", "boilerplate", "boilerplate"] + ["visual"] * 49 + ["text"] * n_text + ["boilerplate"] * 4
            token_ids = np.arange(len(modality)) * 7919 % 2048
            positions = sampler.choose_positions(task, cluster, labels(modality))
            rows = [f"{task},{cluster},{condition},{place},{token_ids[place]}" for place in positions.tolist()]
            digest.update("\n".join(rows).encode())
    assert digest.hexdigest() == "2dba460225271edd2e10beba9a06b2efb72e6e25b90f912d40f74ac0cd626967"


def test_positions_take_the_same_patches_wherever_the_image_stands():
    sampler = Sampler(0, tokens=4)
    front = labels(["bos"] + ["visual"] * 30 + ["text"] * 9)
    back = labels(["bos"] + ["text"] * 9 + ["visual"] * 30)
    first = sampler.choose_positions("t", "c", front)
    second = sampler.choose_positions("t", "c", back)
    assert first.size == second.size == 9  # with the BOS token
    assert (first[(first >= 1) & (first <= 30)] - 1).tolist() == (second[second >= 10] - 10).tolist()


def test_positions_take_the_same_words_whatever_an_image_costs():
    sampler = Sampler(0, tokens=4)
    small = sampler.choose_positions("t", "c", labels(["bos"] + ["visual"] * 5 + ["text"] * 30))
    large = sampler.choose_positions("t", "c", labels(["bos"] + ["visual"] * 50 + ["text"] * 30))
    assert (small[small >= 6] - 6).tolist() == (large[large >= 51] - 51).tolist()


def test_positions_of_a_few_template_and_special_tokens_beside_the_same_visual_and_text_tokens():
    around = ["bos", "special", *["boilerplate"] * 20]
    content = ["visual"] * 40 + ["text"] * 40
    labeled = labels(content + around)
    chosen = Sampler(0).choose_positions("t", "c", labeled)
    assert np.array_equal(chosen[chosen < 80], Sampler(0).choose_positions("t", "c", labels(content)))
    assert (chosen >= 80).sum() == 8
    assert (Sampler(0, tokens=3).choose_positions("t", "c", labeled) >= 80).sum() == 3
    kinds = ["bos", "special", "boilerplate", "visual", "sink", "padding", "text"]
    assert Sampler(0).choose_positions("t", "c", labels(kinds)).tolist() == [0, 1, 2, 3, 6]


@pytest.mark.parametrize(
    ("argument", "settings"), [("capture_clusters", {"clusters": -1}), ("capture_tokens", {"tokens": 0})]
)
def test_sizes_below_one_are_refused(argument, settings):
    with pytest.raises(InputError, match=argument):
        Sampler(0, **settings)
