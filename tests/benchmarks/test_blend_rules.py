"""Rules of what a blend computes: what each chooses, and one run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import blend_rules
from benchmarks.blend_rules import AGAIN, CONTROL, KINDS, NUMBERS, SCORES, Known, Rule, chosen, since_break, texts
from rksc_sgl.blending.plan import LEAD
from rksc_sgl.testing import write_tiny_model
from rksc_sgl.testing.eager_blend import Probed, served_choice

SOURCE = torch.tensor([-1, -1, *range(10, 40), -1, *range(50, 60)])  # two spans, of 30 and of 10 tokens
COUNT = len(SOURCE)


def known() -> Known:
    generator = torch.Generator().manual_seed(3)
    deviation, attended, spread, moved = torch.rand(4, COUNT, generator=generator)
    number = torch.zeros(COUNT, dtype=torch.bool)
    number[20] = True
    return Known(Probed(SOURCE, deviation, attended, spread), number, moved)


def test_every_rule_computes_what_the_donor_has_not_and_what_follows_a_break() -> None:
    always = {0, 1, *range(2, 2 + LEAD), 32, *range(33, 33 + LEAD), COUNT - 1}
    assert set(chosen(known(), Rule("nothing")).nonzero().flatten().tolist()) == always
    assert set(chosen(known(), Rule(NUMBERS)).nonzero().flatten().tolist()) == always | {19, 20, 21, 22}
    for name in SCORES:
        assert set(chosen(known(), Rule(name, 0.0)).nonzero().flatten().tolist()) == always
        found = chosen(known(), Rule(name, 0.5))
        count = int((found & (SOURCE >= 0)).sum())
        assert 20 <= count <= 21, "half of the 40 that could be taken over; the last one always"


def test_the_rule_of_products_is_what_a_server_computes() -> None:
    for share in (0.0, 0.2, 0.5, 1.0):
        served = served_choice(threshold=-1.0, share=share)(known().probed)
        assert torch.equal(chosen(known(), Rule("attended x deviation", share)), served)


def test_first_and_last_are_the_first_of_each_span_and_the_last_of_the_prompt() -> None:
    assert since_break(SOURCE)[[0, 1, 2, 3, 31, 32, 33, 34]].tolist() == [0, 0, 0, 1, 29, 0, 0, 1]
    first = chosen(known(), Rule("first", 0.3)).nonzero().flatten().tolist()
    assert first == [*range(8), 32, 33, 34, 35, 36, 37, 38, 42]
    last = chosen(known(), Rule("last", 0.3)).nonzero().flatten().tolist()
    assert last[-4:] == [39, 40, 41, 42]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_share_their_material_and_the_control_has_another(kind: str) -> None:
    made = list(texts(kind, 3, 150, lambda text: len(text.split()), seed=0))
    assert made == list(texts(kind, 3, 150, lambda text: len(text.split()), seed=0))
    for text in made:
        (opening, body), (donors, same) = (one.split("\n\n", 1) for one in (text.branch, text.donor))
        assert body == same and opening != donors
        assert text.other.startswith(opening) and text.other.split("\n\n", 1)[1] != body
        assert 60 < len(body.split()) < 260
        assert (text.answer and text.answer in body) or kind != "words"
        assert any(map(str.isdigit, body)) is (kind != "words")
    assert len({text.branch for text in made}) == 3


def test_a_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "tiny", num_hidden_layers=4)
    arguments = ["--model-path", str(model), "--prompts", "2", "--material", "120", "--tokens", "12", "--shares", "0.2"]
    assert blend_rules.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["kinds"]) == list(KINDS)
    for rules in result["kinds"].values():
        assert set(rules) == {"nothing", NUMBERS, *(f"{name} 0.2" for name in SCORES), str(AGAIN), str(CONTROL)}
        noise = rules[str(AGAIN)]
        assert noise["equal"] == 1.0 and noise["kl"] < 1e-6 and abs(noise["loss"]) < 1e-4
        for name, one in rules.items():
            assert one["prompts"] == 2 and 0.0 < one["computed"] < 1.0
            assert name == str(AGAIN) or one["kl"] > 100 * noise["kl"]
        assert rules["nothing"]["computed"] < rules["oracle 0.2"]["computed"]


def test_wrong_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--shares", "1.5"], "--shares"), (["--prompts", "0"], "--prompts")):
        with pytest.raises(SystemExit):
            blend_rules.main(arguments)
        assert said in capsys.readouterr().err
