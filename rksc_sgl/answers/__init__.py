"""Answers of branches: found in a text, compared, voted on. No SGLang."""

from rksc_sgl.answers.calls import calls_answer
from rksc_sgl.answers.classes import AnswerClasses, classes_of
from rksc_sgl.answers.extraction import (
    branch_answer,
    extract_answer,
    extractor_of,
    json_field,
    normalize_answer,
    stated_answer,
)
from rksc_sgl.answers.mathematics import MathWorker, same_answer
from rksc_sgl.answers.votes import Agreement, agreement, majority

__all__ = [
    "Agreement",
    "AnswerClasses",
    "MathWorker",
    "agreement",
    "branch_answer",
    "calls_answer",
    "classes_of",
    "extract_answer",
    "extractor_of",
    "json_field",
    "majority",
    "normalize_answer",
    "same_answer",
    "stated_answer",
]
