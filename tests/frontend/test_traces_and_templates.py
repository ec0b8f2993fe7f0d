from __future__ import annotations

import math

import jinja2
import pytest

from rksc_sgl.frontend.chat_affixes import ASSISTANT, LAST, SYSTEM, USER, Renderings, template_from_renderings
from rksc_sgl.frontend.confidence import mean_top1_probability
from rksc_sgl.frontend.token_trace import TokenTrace, trace_of_response
from rksc_sgl.frontend.verify import verification_suffix

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

    def render(*messages: tuple[str, str], opened: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return compiled.render(messages=turns, add_generation_prompt=opened)

    question = (("system", SYSTEM), ("user", USER))
    answer = (*question, ("assistant", ASSISTANT))
    return Renderings(
        question=render(*question),
        prompt=render(*question, opened=True),
        conversation=render(*answer, ("user", LAST)),
        answer=render(*answer),
        no_system=render(("user", USER)),
        start=start,
    )


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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response("ab", [5, 6], {"type": "length"}), TokenTrace("Pab", (1, 2, 5, 6))),
        (response("a", [5, 9], {"type": "stop", "matched": 9}), TokenTrace("Pa", (1, 2, 5))),
        (response("a", [5, 6], {"type": "stop", "matched": "\n"}), TokenTrace("P", (1, 2))),
        ({**response("a", [5], {"type": "length"}), "output_ids": [5, 6]}, TokenTrace("P", (1, 2))),
    ],
)
def test_ids_are_kept_where_they_spell_exactly_the_text(answer: dict, expected: TokenTrace) -> None:
    assert trace_of_response("P", [1, 2], answer) == expected


def test_confidence_is_the_mean_probability_of_the_top_token() -> None:
    logprobs = [[(math.log(0.5), 1, None)], None, [(math.log(0.9), 2, None), (math.log(0.05), 3, None)]]
    assert mean_top1_probability(logprobs) == pytest.approx(0.7)
    assert mean_top1_probability([]) is None
