from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.donor_index import BYTES_PER_PREFIX, GRAM, POSTINGS, SKETCH, Candidate, DonorIndex

VOCABULARY = 40_000


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def test_the_prefix_with_the_most_common_material_comes_first() -> None:
    index = DonorIndex()
    material = words(1, 900)
    index.add("none", words(2, 900))
    index.add("a third", words(3, 600) + material[:300])
    index.add("most", material[400:] + words(4, 50) + material[:350])
    found = index.candidates(words(5, 100) + material)
    assert [one.key for one in found] == ["most", "a third"]
    assert 600 <= found[0].overlap <= 1000
    assert 200 <= found[1].overlap <= 420


def test_equal_prefixes_are_ordered_by_last_use() -> None:
    index = DonorIndex()
    for key in "abc":
        index.add(key, words(1, 500))
    assert [one.key for one in index.candidates(words(1, 500))] == ["c", "b", "a"]
    assert index.touch("a") and not index.touch("missing")
    assert [one.key for one in index.candidates(words(1, 500), limit=2)] == ["a", "c"]


def test_a_lookup_changes_nothing() -> None:
    index = DonorIndex(2 * BYTES_PER_PREFIX)
    index.add("first", words(1, 300))
    index.add("second", words(2, 300))
    for _ in range(3):
        assert index.candidates(words(1, 300))[0].key == "first"
    index.add("third", words(3, 300))
    assert index.pop_dropped() == ["first"]


def test_namespaces_never_mix() -> None:
    index = DonorIndex()
    index.add("mine", words(1, 500), "lora a")
    assert index.candidates(words(1, 500), "lora b") == []
    assert index.candidates(words(1, 500)) == []
    index.add("theirs", words(1, 500), "lora b")
    assert [one.key for one in index.candidates(words(1, 500), "lora a")] == ["mine"]
    assert [one.key for one in index.candidates(words(1, 500), "lora b")] == ["theirs"]


def test_a_busy_namespace_does_not_push_out_another_ones_postings() -> None:
    index = DonorIndex()
    index.add("mine", words(1, 500), "quiet")
    for key in range(10 * POSTINGS):
        index.add(key, words(1, 500), "busy")
    assert [one.key for one in index.candidates(words(1, 500), "quiet")] == ["mine"]


def test_a_template_that_all_share_does_not_hide_the_donor() -> None:
    index = DonorIndex()
    template = words(0, 600)
    for key in range(400):
        index.add(key, template + words(10 + key, 300))
    found = index.candidates(template + words(9, 40) + words(10 + 7, 300)[50:])
    assert found[0].key == 7
    assert found[0].overlap > found[1].overlap


def test_prompts_that_share_only_a_template_are_told_apart_by_the_minimum() -> None:
    index = DonorIndex()
    index.add("other", words(0, 100) + words(1, 800))
    prompt = words(0, 100) + words(2, 800)
    assert index.candidates(prompt, minimum_overlap=300) == []
    assert index.candidates(words(3, 800), minimum_overlap=0) == []


def test_removed_and_replaced_prefixes_are_not_found() -> None:
    index = DonorIndex()
    index.add("key", words(1, 500))
    index.add("key", words(2, 500))
    assert len(index) == 1 and "key" in index
    assert index.candidates(words(1, 500)) == []
    assert [one.key for one in index.candidates(words(2, 500))] == ["key"]
    assert index.remove("key") and not index.remove("key")
    assert index.candidates(words(2, 500)) == [] and len(index) == 0
    assert index.pop_dropped() == []


@pytest.mark.parametrize("count", [0, 1, GRAM - 1])
def test_prefixes_below_one_gram_are_held_but_never_found(count: int) -> None:
    index = DonorIndex()
    index.add("short", words(1, count))
    assert "short" in index
    assert index.candidates(words(1, count), minimum_overlap=0) == []
    assert index.remove("short")


def test_short_prefixes_are_counted_exactly() -> None:
    index = DonorIndex()
    index.add("short", words(1, SKETCH // 2))
    assert index.candidates(words(1, SKETCH // 2)) == [Candidate("short", SKETCH // 2)]
    assert index.candidates([7] * 50, minimum_overlap=0) == []
    assert index.candidates(words(1, SKETCH // 2), limit=0) == []


def test_memory_stays_within_the_budget() -> None:
    budget = 300 * BYTES_PER_PREFIX
    index = DonorIndex(budget)
    for key in range(1000):
        index.add(key, words(key, 200))
        assert index.memory_bytes <= budget
    assert len(index) == 300
    assert index.pop_dropped() == list(range(700))
    assert index.pop_dropped() == []
    assert index.candidates(words(650, 200)) == []
    assert index.candidates(words(750, 200))[0].key == 750


def test_a_budget_below_one_prefix_is_an_error() -> None:
    with pytest.raises(OptionError, match=f"max_bytes: must be at least {BYTES_PER_PREFIX}"):
        DonorIndex(BYTES_PER_PREFIX - 1)
    index = DonorIndex(BYTES_PER_PREFIX)
    index.add("one", words(1, 500))
    index.add("two", words(2, 500))
    assert index.pop_dropped() == ["one"]
    assert index.candidates(words(2, 500))[0].key == "two"


PROGRAM = """
import numpy as np
from rksc_sgl.similarity.donor_index import DonorIndex
words = lambda seed, count: np.random.default_rng(seed).integers(0, 40000, count).tolist()
index = DonorIndex(60 * 3000)
for key in range(80):
    index.add(("name", key), words(key % 7, 150) + words(key, 150), f"space {key % 3}")
print([index.candidates(words(key % 7, 150), f"space {key % 3}") for key in range(30)], index.pop_dropped())
"""


def test_every_process_gives_the_same_answers() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "Candidate" in outputs.pop()


operations = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "touch"]), st.integers(0, 12), st.integers(0, 4), st.integers(0, 2)),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(operations)
def test_the_index_holds_what_a_plain_list_would_hold(steps: list[tuple[str, int, int, int]]) -> None:
    capacity = 8
    index = DonorIndex(capacity * BYTES_PER_PREFIX)
    held: dict[int, tuple[int, int]] = {}  # key to text and namespace, least recently used first
    for name, key, text, namespace in steps:
        known = held.pop(key, None)
        if name == "add":
            dropped = [next(iter(held))] if len(held) == capacity else []
            index.add(key, words(text, 40 + 60 * text), namespace)
            for one in dropped:
                del held[one]
            assert index.pop_dropped() == dropped
            held[key] = (text, namespace)
        elif name == "touch":
            assert index.touch(key) == (known is not None)
            if known is not None:
                held[key] = known
        else:
            assert index.remove(key) == (known is not None)
    assert len(index) == len(held)
    for text in range(5):
        for namespace in range(3):
            found = index.candidates(words(text, 40 + 60 * text), namespace, limit=20)
            assert [one.key for one in found] == [key for key, what in held.items() if what == (text, namespace)][::-1]


@pytest.mark.slow
def test_the_planted_donor_is_found_among_twenty_thousand() -> None:
    index = DonorIndex(20_000 * BYTES_PER_PREFIX)
    template = words(0, 60)
    for key in range(20_000):
        index.add(key, template + words(100 + key, 400))
    for key in range(0, 20_000, 500):
        material = words(100 + key, 400)
        prompt = template + words(key + 1, 50) + material[200:] + [5] + material[20:180]
        assert index.candidates(prompt)[0].key == key
    assert len(index) == 20_000 and index.pop_dropped() == []
