from __future__ import annotations

import pytest

from rksc_sgl.similarity.content_guard import same_content
from rksc_sgl.similarity.instructions import is_harmless

CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TOM = "Tom has 5 apples and gives 2 to Ann. How many apples does Tom have?"
TURNS = f"<|im_start|>user\n{TOM}<|im_end|>\n<|im_start|>assistant\nHe has 3.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        (TOM, "Think step by step.\n\n" + TOM),
        ("Problem: " + TOM, TOM + " Please explain your reasoning."),
        ("Hello, I'd like you to solve the following word problem, please.\n" + TOM, TOM + "\nSolution:"),
        ("Solve it carefully, then state the final number.\n" + TOM, "Hi! Could you please help me with this?\n" + TOM),
        (CHAT.format("You are a careful mathematician.", TOM), CHAT.format("You are a helpful assistant.", TOM)),
        (CHAT.format("Think carefully before you answer.", TOM), CHAT.format("", TOM + "\nShow your work.")),
    ],
)
def test_harmless_instructions_around_a_question_are_left_out(donor: str, branch: str) -> None:
    assert same_content(donor, branch).same
    assert same_content(branch, donor).same


@pytest.mark.parametrize(
    "demand",
    [
        "Answer in one word.",
        "Answer in French.",
        "Round to 2 decimals.",
        "Do not explain.",
        "Explain the problem.",
        "Give the number of steps.",
        "End with 'The answer is N'.",
        "Give only the answer.",
        "Give the answer twice.",
        "Answer the question twice.",
        "Repeat the question.",
        "You are a pirate.",
        "Is this correct?",
        "Is the answer clear?",
        "Are you an AI?",
        "Will it work?",
        "It is correct.",
        "The teacher is kind.",
        "We have the answer.",
    ],
)
def test_a_sentence_that_may_change_the_answer_is_kept(demand: str) -> None:
    assert not same_content(TOM, f"{TOM}\n{demand}").same
    assert not same_content(f"{demand}\n{TOM}", TOM).same
    assert not same_content(CHAT.format(demand, TOM), CHAT.format("", TOM)).same


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        # nothing else asks
        ("Explain your answer.", "Solve the problem."),
        ("Tom has 5 apples.\nExplain your answer.", "Tom has 5 apples.\nSolve it."),
        ("He couldn't find 5 apples. Explain your answer.", "He couldn't find 5 apples. Solve it."),
        ("", "Solve it."),
        # the question speaks of instructions or with their reader
        ("Solve it.\nHow many words are in this prompt?", "How many words are in this prompt?"),
        ("Show your work. What did I ask you to do?", "Think step by step. What did I ask you to do?"),
        (CHAT.format("You are a tutor.", "What are you?"), CHAT.format("You are an assistant.", "What are you?")),
        (CHAT.format("You are a tutor.", "Who is the tutor?"), CHAT.format("You are a teacher.", "Who is the tutor?")),
        ("Solve this puzzle. Who wrote it?", "Answer this question. Who wrote it?"),
        ("Who won? Give the number.", "Who won?"),
        # they stand inside of the content, or belong to it
        ("He said: Explain your answer. Why?", "He said. Why?"),
        (
            "The teacher is kind. The tutor is careful. Who is kind?",
            "The teacher is careful. The tutor is kind. Who is kind?",
        ),
        ("He wrote. Show your work. Who is he?", "He wrote. Solve it. Who is he?"),
        ("Why? He said no. Show your work.", "Why? He said no. Solve it."),
        ('He read: "Why?\nShow your work.\nSolve it."', 'He read: "Why?\nSolve it.\nShow your work."'),
        ("He read: “Why?\nShow your work.\n Go.”", "He read: “Why?\nSolve it.\n Go.”"),
        ("He read: “Why?\nShow your work.", "He read: “Why?\nSolve it."),
        ("Read the question\nin French. Why?", "Solve the problem\nin French. Why?"),
        (f"Find x and solve it.{' ' * 271}", "Find x and"),
        ("Why?\nShow your work.\u00a0", "Why?"),
        (CHAT.format("Solve it.\u200a", "Why?"), CHAT.format("Solve it.", "Why?")),
        ("Who won? Give the Number.", "Who won?"),
        (CHAT.format("Give the number.", "Who won?"), CHAT.format("Show your work.", "Who won?")),
        ("A student asks for help with this: Tom ran. Who is the student?", "Solve this. Tom ran. Who is the student?"),
        ("Why?\n```\nls?\nThink.", "Why?\n```\nls?\nReason."),
        # more than one question was asked
        (TURNS + "Explain your answer.", TURNS + "Check your answer."),
        (TURNS + "Why? Explain your answer.", TURNS + "Why? Check your answer."),
        (
            "User: Why?\nAssistant: No.\nUser: Explain your answer.",
            "User: Why?\nAssistant: No.\nUser: Check your answer.",
        ),
        # the answer that is begun, and its place
        (f"{TOM}\nQuestion:", f"{TOM}\nAnswer:"),
        (CHAT.format("", TOM), CHAT.format("", TOM).removesuffix("<|im_start|>assistant\n")),
        (f"<|im_start|>user\n{TOM}", f"<|im_start|>assistant\n{TOM}"),
        ("<|im_start|>user\nHe ran.<|im_end|>\n<|im_start|>user\nWhy?", "<|im_start|>user\nHe ran. Why?"),
        ("<|endoftext|>He ran. Why?", "He ran. Why?"),
        # the system text says more than that
        (CHAT.format("Answer in French.", f"Solve it.\n{TOM}"), CHAT.format("Answer in French.", TOM)),
    ],
)
def test_instructions_count_where_the_question_leans_on_them(donor: str, branch: str) -> None:
    assert not same_content(donor, branch).same


def test_a_number_may_be_demanded_where_one_is_asked_for() -> None:
    assert same_content(f"{TOM} Give the number.", TOM).same
    assert not same_content(
        "Tom is 5 and Ann 6. Who is older? Give the number.", "Tom is 5 and Ann 6. Who is older?"
    ).same


@pytest.mark.parametrize(
    ("sentence", "stop", "harmless"),
    [
        ("Please  reason step-by-step", ".", True),
        ("You are a patient math tutor who explains each step clearly", ".", True),
        ("Can you show me the solution", "?", True),
        ("Can you show me the solution", ".", False),
        ("Show the solution", "?", False),
        ("Solve the problems of this city", ".", False),
        ("Find the number", ".", False),
        ("please please please", ".", False),
    ],
)
def test_a_sentence_is_harmless_as_a_whole_or_not_at_all(sentence: str, stop: str, harmless: bool) -> None:
    assert is_harmless(sentence, stop) is harmless
