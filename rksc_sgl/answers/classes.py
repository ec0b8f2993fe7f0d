"""Equal answers as one class."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

from rksc_sgl.answers.mathematics import same_answer, same_answers

_REMEMBERED = 512  # lists of answers

Equal = Callable[[str, str], bool]


class AnswerClasses:
    """Names each class of equal answers by the spelling that came first, while answers come in one by one.

    An answer is compared with every other that there is, and joins the oldest class in which it has an equal. Where
    equality is transitive, as it is for all answers with an exact form, the classes do not depend on the order in
    which answers come in. Where it is not, an answer that equals members of two classes joins the older one and the two
    stay apart: votes that were counted are never moved. :func:`classes_of`, which has all answers at once, joins them.

    Args:
        equal: whether two different spellings are the same answer; by default :func:`same_answer`.
    """

    def __init__(self, equal: Equal = same_answer) -> None:
        self._equal = equal
        self._class_of: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, answer: str | None) -> str | None:
        """The spelling that names the answer's class; None for no answer."""
        if answer is None:
            return None
        with self._lock:
            if answer not in self._class_of:
                equals = {
                    self._class_of[known]
                    for known, same in _compared(answer, list(self._class_of), self._equal)
                    if same
                }
                oldest_first = dict.fromkeys(self._class_of.values())
                self._class_of[answer] = next((name for name in oldest_first if name in equals), answer)
            return self._class_of[answer]


def classes_of(answers: Sequence[str | None], equal: Equal = same_answer) -> list[str | None]:
    """Each answer under the first spelling of its class, in their order.

    A class is all that hangs together by equal pairs, so that which answers are in one class does not depend on their
    order, whether or not equality is transitive. With the default equality the result is remembered.
    """
    found = _remembered(tuple(answers)) if equal is same_answer else _joined(answers, equal)
    return list(found)


@lru_cache(_REMEMBERED)
def _remembered(answers: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return _joined(answers, same_answer)


def _joined(answers: Sequence[str | None], equal: Equal) -> tuple[str | None, ...]:
    class_of: dict[str, str] = {}
    for answer in dict.fromkeys(answers):
        if answer is None:
            continue
        equals = {class_of[known] for known, same in _compared(answer, list(class_of), equal) if same}
        name = next((name for name in class_of if name in equals), answer)  # a class's name is its first member
        class_of = {known: name if other in equals else other for known, other in class_of.items()}
        class_of[answer] = name
    return tuple(None if answer is None else class_of[answer] for answer in answers)


def _compared(answer: str, others: list[str], equal: Equal) -> list[tuple[str, bool]]:
    if equal is same_answer:
        return list(zip(others, same_answers(answer, others), strict=True))
    return [(other, equal(other, answer)) for other in others]
