"""What siblings draft for one another: accepted tokens a step under SGLang's NGRAM speculation, replayed on recordings.

    python -m benchmarks.sibling_speculation --recordings F --model-path M

``--speculative-algorithm NGRAM`` drafts from a trie of what all requests generated and needs no draft model. Branches
of one prompt say the same things in nearly the same words, so they should draft for one another. The trie is SGLang's
own (``NgramCorpus``, with the server's defaults); what is replayed are branches that ``benchmarks.sibling_stop``
recorded: in each step every branch gets a draft, keeps what its recorded text goes on with and one token more, and what
it has said is put into the trie, as SGLang's worker does it. A token that was sampled is a sample of the model whatever
was drafted, so acceptance is that of a server at the temperature of the recording, token for token.

Arms: branches of one fork at once; as many branches of different problems; each branch alone. Each with a trie that
begins empty, and with one that has the branches of all other problems already. What a step costs is not known here:
verifying a draft computes ``--draft-tokens`` rows where decoding computes one, which is nearly free where decoding is
bound by reading weights, and costs so many times more where it is bound by arithmetic, as on a CPU.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.fork_recordings import SYSTEM, RecordedFork, Settings, load
from programs.problems import Problem, load_problems
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.model_fetch import resolve_model

DEPTH, LEAST_BREADTH, BREADTH, DRAFT = 18, 1, 10, 12  # defaults of a server
FORK, UNRELATED, ALONE = "fork", "unrelated", "alone"


@dataclass(frozen=True)
class Branch:
    """One recorded branch: the end of its prompt, and what it said."""

    prompt: list[int]
    said: list[int]


@dataclass(frozen=True)
class Steps:
    """Branches that were decoded together.

    Attributes:
        tokens: of all of them.
        steps: of all of them; one a token without drafts.
        longest: steps until the last of them had ended.
        longest_plain: the same without drafts.
    """

    tokens: int
    steps: int
    longest: int
    longest_plain: int


class Trie:
    """SGLang's own, of one server."""

    def __init__(self, draft_tokens: int) -> None:
        from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

        self.size = draft_tokens
        self._corpus = NgramCorpus(
            max_trie_depth=DEPTH, min_bfs_breadth=LEAST_BREADTH, max_bfs_breadth=BREADTH, draft_token_num=draft_tokens
        )

    def put(self, tails: Sequence[list[int]]) -> None:
        """What requests end with now."""
        self._corpus.batch_put(list(tails))
        self._corpus.synchronize()

    def drafts(self, tails: Sequence[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """For each request the drafted tokens, its last one first, and ``[size, size]`` who descends from whom."""
        names = [str(index) for index in range(len(tails))]
        self._corpus.erase_match_state(names)  # every step is matched anew, so that nothing is kept between forks
        tokens, mask = self._corpus.batch_get(names, list(tails), [len(tail) for tail in tails])
        for index in range(len(tails)):
            begin = index * self.size
            yield tokens[begin : begin + self.size].tolist(), mask.reshape(-1, self.size, self.size)[index]

    def close(self) -> None:
        self._corpus.reset()


def accepted(tokens: Sequence[int], mask: np.ndarray, follows: Sequence[int]) -> int:
    """How many of the tokens that follow a draft has, one after the other.

    Args:
        tokens: drafted ones, after the last one of the request, which is the first of them.
        mask: ``[n, n]``, 1 where the second is an ancestor of the first, or it itself.
        follows: what the request really goes on with.
    """
    place, found = 0, 0
    for token in follows:
        path = set(np.flatnonzero(mask[place])) if place else {0}
        children = [row for row in range(1, len(tokens)) if set(np.flatnonzero(mask[row])) - {row} == path]
        place = next((row for row in children if tokens[row] == token), 0)
        if not place:
            break
        found += 1
    return found


def decode(branches: Sequence[Branch], trie: Trie) -> Steps:
    """Decode branches side by side."""
    said = [0] * len(branches)
    steps = [0] * len(branches)
    while open_ones := [index for index, one in enumerate(branches) if said[index] < len(one.said)]:
        tails = [_tail(branches[index], said[index]) for index in open_ones]
        for index, (tokens, mask) in zip(open_ones, trie.drafts(tails), strict=True):
            left = branches[index].said[said[index] :]
            said[index] += min(len(left), 1 + accepted(tokens, mask, left[: trie.size]))
            steps[index] += 1
        trie.put([_tail(branches[index], said[index]) for index in open_ones])
    lengths = [len(one.said) for one in branches]
    return Steps(sum(lengths), sum(steps), max(steps), max(lengths))


def _tail(branch: Branch, said: int) -> list[int]:
    """The end of what a request has, as much of it as the trie looks at."""
    return [*branch.prompt, *branch.said[:said]][-DEPTH:]


def arms(forks: Sequence[Sequence[Branch]]) -> dict[str, list[list[Branch]]]:
    """Which branches are decoded together, in each arm the same ones in all."""
    size = min(len(forks[0]), len(forks))
    rows = [list(fork[: len(forks[0])]) for fork in forks]
    mixed = [[rows[(first + step) % len(rows)][place] for step in range(size)] for place, first in _starts(rows, size)]
    return {FORK: rows, UNRELATED: mixed, ALONE: [[one] for row in rows for one in row]}


def _starts(rows: Sequence[Sequence[Branch]], size: int) -> list[tuple[int, int]]:
    """For each branch's place the problems at which groups of others begin, so that each branch is in one group."""
    return [(place, first) for place in range(len(rows[0])) for first in range(0, len(rows) - size + 1, size)]


def measure(forks: Sequence[Sequence[Branch]], draft_tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of every arm, with an empty trie and with a warm one."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, groups in arms(forks).items():
        for warm in (False, True):
            found = []
            for group in tqdm(groups, desc=f"{name}, {'warm' if warm else 'empty'}", file=sys.stderr):
                with closing(Trie(draft_tokens)) as trie:
                    if warm:
                        _warm(trie, [one for fork in forks for one in fork if not _of_same_problem(one, group)])
                    found.append(decode(group, trie))
            result.setdefault(name, {})["warm" if warm else "empty"] = figures(found)
    return result


def _of_same_problem(one: Branch, group: Sequence[Branch]) -> bool:
    return any(one.prompt == other.prompt for other in group)


def _warm(trie: Trie, branches: Sequence[Branch]) -> None:
    """Put what branches said, window by window, as it is put while they are decoded."""
    for one in branches:
        trie.put([_tail(one, end) for end in range(1, len(one.said) + 1, DEPTH // 2)])


def figures(found: Sequence[Steps]) -> dict[str, float]:
    """Of all groups of an arm."""
    return {
        "accepted": round(sum(one.tokens for one in found) / sum(one.steps for one in found), 3),
        "steps_ratio": round(sum(one.longest for one in found) / sum(one.longest_plain for one in found), 3),
    }


def branches_of(settings: Settings, forks: Sequence[RecordedFork], tokenizer: Any, count: int) -> list[list[Branch]]:
    """The first branches of each fork as token ids.

    Raises:
        OptionError: a fork has fewer.
    """
    problems = _problems(settings, {fork.problem for fork in forks})
    found = []
    for fork in forks:
        if len(fork.texts) < count:
            raise OptionError(f"--branches: {fork.problem} has {len(fork.texts)} branches, asked for {count}")
        prompt = tokenizer.apply_chat_template(
            problems[fork.problem].messages(SYSTEM), add_generation_prompt=True, return_dict=False
        )
        said = [tokenizer.encode(text, add_special_tokens=False) for text in fork.texts[:count]]
        found.append([Branch(list(prompt), ids) for ids in said if ids])
    return found


def _problems(settings: Settings, names: set[str]) -> dict[str, Problem]:
    """The problems of these names: a recording may have any of a source's."""
    count = len(names)
    while True:
        found = {one.id: one for one in load_problems(settings.source, count, settings.seed)}
        if names <= found.keys():
            return found
        count *= 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sibling_speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recordings", type=Path, required=True, metavar="F", help="of benchmarks.sibling_stop")
    parser.add_argument("--model-path", required=True, help="the recorded model, for its tokenizer")
    parser.add_argument("--branches", type=int, default=8, help="decoded at once")
    parser.add_argument("--draft-tokens", type=int, default=DRAFT, help="of a draft, the token before it among them")
    options = parser.parse_args(argv)
    if options.draft_tokens < 2 or options.branches < 1:
        parser.error("--draft-tokens: must be at least 2; --branches: at least 1")
    try:
        from transformers import AutoTokenizer

        settings, forks = load(options.recordings)
        if not forks:
            raise OptionError(f"recordings: {options.recordings} has no forks")
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(options.model_path))
        found = measure(branches_of(settings, forks, tokenizer, options.branches), options.draft_tokens)
    except RkscError as error:
        print(f"sibling_speculation: {error}", file=sys.stderr)
        return 1
    table = Table("branches", "trie", "accepted tokens a step", "steps, over those without drafts", box=box.SIMPLE)
    for name, kinds in found.items():
        for kind, one in kinds.items():
            table.add_row(name, kind, f"{one['accepted']:.2f}", f"{one['steps_ratio']:.2f}")
    Console(file=sys.stderr, width=120).print(table)
    result = {
        "model": settings.model,
        "source": settings.source,
        "temperature": settings.temperature,
        "problems": len(forks),
        "branches": options.branches,
        "draft_tokens": options.draft_tokens,
        "accepted_fork": found[FORK]["empty"]["accepted"],
        "accepted_unrelated": found[UNRELATED]["empty"]["accepted"],
        "arms": found,
    }
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
