from __future__ import annotations

import math
from collections.abc import Sequence

import jinja2
import pytest

from rksc_sgl.frontend.chat_affixes import template_from_renderings
from rksc_sgl.frontend.verify import verification_suffix
from rksc_sgl.generated.confidence import is_measured, mean_top1_probability
from rksc_sgl.generated.known_ids import KnownIds, PromptLedger, ids_after
from rksc_sgl.verifying.chat_affixes import Renderings

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nDefault.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<bos>{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
SWALLOWS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def renderings(template: str, start: str = "") -> Renderings:
    compiled = jinja2.Template(template, keep_trailing_newline=True)

    def render(messages: Sequence[tuple[str, str]], opened: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return compiled.render(messages=turns, add_generation_prompt=opened)

    return Renderings.by(render, start)


def test_chatml_is_read_with_its_default_system_prompt() -> None:
    template = template_from_renderings(renderings(CHATML))
    assert template is not None
    assert template.default_system_prompt == "Default."
    assert template.role_prefix_and_suffix == {
        "system": ("<|im_start|>system\n", "<|im_end|>\n"),
        "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    }


def test_the_begin_of_sequence_token_is_left_to_the_tokenizer() -> None:
    template = template_from_renderings(renderings(LLAMA3, start="<bos>"))
    assert template is not None
    assert template.default_system_prompt is None
    assert template.role_prefix_and_suffix["system"] == ("<h>system</h>\n\n", "<eot>")


def test_a_template_that_drops_a_message_is_not_guessed_at() -> None:
    assert template_from_renderings(renderings(SWALLOWS_SYSTEM)) is None


def test_the_question_is_a_turn_where_the_program_speaks_in_turns() -> None:
    template = template_from_renderings(renderings(CHATML))
    assert template is not None
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    suffix = verification_suffix("Right?", template, turns)
    assert suffix == "<|im_start|>user\nRight?<|im_end|>\n<|im_start|>assistant\n"
    assert verification_suffix("Right?", template, []) == "\n\nRight?\n"


def response(text: str, ids: list[int], finish: dict) -> dict:
    return {
        "text": text,
        "output_ids": ids,
        "meta_info": {"completion_tokens": len(ids), "finish_reason": finish},
    }


SPELLED = {5: "a", 6: "b", 7: "<|end|>", 8: "\ufffd", 9: "<|stop|>"}


def spell(ids: list[int]) -> str:
    return "".join(SPELLED[one] for one in ids)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response("ab", [5, 6], {"type": "length"}), KnownIds("Pab", (1, 2, 5, 6))),
        (response(" ab", [5, 6], {"type": "length"}), KnownIds("P ab", (1, 2, 5, 6))),  # a SentencePiece's space
        (response("a", [5, 9], {"type": "stop", "matched": 9}), KnownIds("Pa", (1, 2, 5))),
        (response("", [9], {"type": "stop", "matched": 9}), KnownIds("P", (1, 2))),
        (response("ab", [5, 6], {"type": "stop", "matched": None}), KnownIds("Pab", (1, 2, 5, 6))),
        (response("a", [5, 6], {"type": "stop", "matched": "\n"}), KnownIds("P", (1, 2))),
        ({**response("a", [5], {"type": "length"}), "output_ids": [5, 6]}, KnownIds("P", (1, 2))),
        (response("ab", [5, 7, 6], {"type": "length"}), KnownIds("P", (1, 2))),  # a special token was sampled
        (response("a", [5, 8], {"type": "length"}), KnownIds("P", (1, 2))),  # half a character
    ],
)
def test_ids_are_kept_where_they_spell_exactly_the_text(answer: dict, expected: KnownIds) -> None:
    assert ids_after("P", [1, 2], answer, spell) == expected


def test_without_a_way_to_spell_ids_the_text_decides() -> None:
    answer = response("ab", [5, 6], {"type": "length"})
    assert ids_after("P", [1, 2], answer, lambda ids: None) == KnownIds("P", (1, 2))


def test_a_ledger_of_prompts_forgets_the_oldest_first() -> None:
    ledger = PromptLedger(most_tokens=5)
    ledger.note("a", [1, 2])
    ledger.note("b", [3, 4])
    assert (ledger.find("a"), ledger.find("b")) == ([1, 2], [3, 4])
    ledger.note("b", [7])
    ledger.note("c", [5, 6, 7])
    assert (ledger.find("a"), ledger.find("b"), ledger.find("c")) == (None, [7], [5, 6, 7])


def test_confidence_is_the_mean_probability_of_the_top_token() -> None:
    logprobs = [[(math.log(0.5), 1, None)], None, [(math.log(0.9), 2, None), (math.log(0.05), 3, None)]]
    assert mean_top1_probability({"output_top_logprobs": logprobs}) == pytest.approx(0.7)
    assert mean_top1_probability({"output_top_logprobs": logprobs}, 2) == pytest.approx(0.9)
    assert mean_top1_probability({"rksc_confidence": [0.5, None, 0.9]}) == pytest.approx(0.7)
    assert mean_top1_probability({"rksc_confidence": [], "output_top_logprobs": logprobs}) is None
    assert mean_top1_probability({}) is None


def test_a_server_measures_confidence_where_all_of_its_schedulers_offer_that() -> None:
    offers, refuses = ({"confidence": {"offered": offered}} for offered in (True, False))
    assert is_measured([offers, offers])
    assert not any(map(is_measured, ([offers, refuses], [offers, None], [{}])))
