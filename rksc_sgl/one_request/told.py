"""What is told of a fork: the verdict in ``rksc``, ``usage``, and progress; as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rksc_sgl.one_request.fork import Chosen, Fork


@dataclass(frozen=True)
class Facts:
    """What the server said of one branch's request.

    Attributes:
        prompt_tokens: None where it ended before it was computed.
        cached_tokens: of these, found in the cache; the same.
        reasoning_tokens: of what it generated.
        report: ``meta_info["rksc"]``.
    """

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int = 0
    report: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, meta_info: Mapping[str, Any], key: str) -> Facts:
        """Of a ``meta_info``, which of an aborted request has little."""
        return cls(
            prompt_tokens=meta_info.get("prompt_tokens"),
            cached_tokens=meta_info.get("cached_tokens"),
            reasoning_tokens=meta_info.get("reasoning_tokens") or 0,
            report=meta_info.get(key),
        )


def verdict_of(group: str, fork: Fork, chosen: Chosen, facts: Mapping[int, Facts]) -> dict[str, Any]:
    """The object ``rksc`` of an answer.

    Args:
        group: under which the server knows the branches.
        fork: that has ended.
        chosen: how.
        facts: of the branches that were sent.
    """
    record, members = fork.record(), fork.members()
    branches = []
    for member, fate in zip(members, record.branches, strict=True):
        known, reading = facts.get(member.index, Facts()), fork.reading(member.index)
        branches.append(
            {
                "branch": member.index,
                "fate": fate.fate,
                "error": member.error,
                "answer": member.answer,
                "confidence": member.confidence,
                "score": None if reading is None else reading.score,
                "label_mass": None if reading is None else reading.label_mass,
                "tokens": fate.tokens,
                "prompt_tokens": known.prompt_tokens,
                "cached_tokens": known.cached_tokens,
                "report": known.report,
                "verification_tokens": fork.verification_tokens(member.index)[0],
                "verification": None if reading is None else reading.report,
            }
        )
    done = record.done
    prompts = [one.prompt_tokens or 0 for one in facts.values()]
    cached = [one.cached_tokens or 0 for one in facts.values()]
    return {
        "group": group,
        "selected": chosen.order[0],
        "order": list(chosen.order),
        "answer": chosen.answer,
        "reason": chosen.reason,
        "partial": chosen.partial,
        "verified": list(chosen.verified),
        "decided": None
        if done is None
        else {
            "reason": done.reason,
            "statement": done.statement,
            "probability": done.probability,
            "votes": [list(vote) for vote in done.votes],
        },
        "tokens": {
            "generated": record.tokens_spent,
            "not_generated": record.tokens_saved,
            "prompts_computed": sum(prompts) - sum(cached),
            "prompts_reused": sum(cached),
            "verifications_computed": sum(fork.verification_tokens(index)[0] for index in range(len(members))),
            "verifications_reused": sum(fork.verification_tokens(index)[1] for index in range(len(members))),
        },
        "branches": branches,
    }


def usage_of(fork: Fork, best: int, facts: Mapping[int, Facts]) -> dict[str, Any]:
    """``usage`` with OpenAI's meaning: the prompt once, the completion tokens of all branches.

    Args:
        fork: that has ended.
        best: the selected branch, whose prompt counts.
        facts: of the branches that were sent.
    """
    prompt = facts[best].prompt_tokens or 0
    completion = fork.record().tokens_spent
    cached = [one.cached_tokens for one in facts.values() if one.cached_tokens is not None]
    reasoning = sum(one.reasoning_tokens for one in facts.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(min(cached, default=0), prompt)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def progress_of(fork: Fork) -> dict[str, int]:
    """How many branches met each fate so far, and the tokens that they generated."""
    record = fork.record()
    fates: dict[str, int] = {}
    for branch in record.branches:
        fates[branch.fate] = fates.get(branch.fate, 0) + 1
    return {**fates, "tokens": record.tokens_spent}
