"""What of a blended prompt has to be computed? Rules of selection side by side: computed tokens against what they lose.

A branch begins with another opening than its donor and reads the same material and question. It takes over the donor's
KV but for the tokens that a rule chooses; then the text that ought to follow is read on that KV and on exact KV
(``rksc_sgl.testing.eager_blend``: plain tensors in float32, no server; the donor's is exact). Three kinds of text:

* words: sentences without numbers; the question is for one of them, and what follows is that sentence;
* problems: GSM8K problems with their solutions before another one; what follows is its solution;
* arithmetic: sums worked step by step before another one; what follows is its own steps.

Of what follows, token by token: ``kl``, of the next token on exact KV to that on blended KV, in nats; ``loss``, how
much less likely the right text has become, in nats a token. The second may be negative: noise has no direction, damage
has. ``equal``: the share of prompts in which every token has the same most likely successor. ``computed``: the share of
the prompt's tokens that went through all layers. The noise is ``exact again``: the branch takes over its own exact KV,
and only its last token is computed. The control is ``another``: it takes over that of other material.

The rules, each at several shares of what could be taken over:

* nothing: what the donor has not, and what follows a break (:func:`~rksc_sgl.blending.plan.after_breaks`); all others
  compute that too;
* numbers: all numbers with the tokens beside them (the greater part of what this project computed before; no share);
* deviation: the tokens whose values moved most in the probe (CacheBlend, arXiv 2405.16444);
* first: the first tokens of every span that was moved (EPIC, arXiv 2410.15332);
* last: the last tokens of the prompt;
* attended: the tokens that the end of the prompt attends to most in the probe (as ProphetKV selects);
* attended x deviation: the product of both, which is what a server does;
* spread x deviation: the same with the attention of tokens from all of the prompt, which is what a server does in a
  chunk of a prompt that is not its last;
* oracle: the product of attention and of the deviation in all layers, which only the exact run knows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.answers_items import with_solution
from benchmarks.divergent_items import FILLER
from benchmarks.pipeline_items import OPENINGS
from programs.problems import GSM8K, load_problems
from rksc_sgl.blending.plan import after_breaks
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.options import DEFAULT_MINIMUM_SPAN
from rksc_sgl.sglang_plugin.passes.split_pass import probed_of
from rksc_sgl.similarity.alignment import align
from rksc_sgl.testing.eager_blend import Choice, EagerLlama, EagerResult, Probed

KINDS = ("words", "problems", "arithmetic")
ALL_ITEMS = 100  # that GSM8K has here
BESIDE = (1, 2)  # tokens before and after a number that went with it


@dataclass(frozen=True)
class Text:
    """One prompt, as user's messages.

    Attributes:
        donor, branch: the same after other openings.
        other: with the branch's opening, and other material.
        answer: what ought to follow.
    """

    donor: str
    branch: str
    other: str
    answer: str


@dataclass(frozen=True)
class Known:
    """A probed prompt, and what only a measurement knows of it.

    Attributes:
        probed: what a server knows.
        number: bool ``[n]``, tokens with a digit.
        moved: ``[n]``, deviation of the exact run from the donor's in all layers after the probe.
    """

    probed: Probed
    number: torch.Tensor
    moved: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.number)


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen.

    Attributes:
        name: of the rule.
        share: of what could be taken over, computed all the same; None where the rule has none.
    """

    name: str
    share: float | None = None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name} {self.share:g}"


AGAIN, CONTROL = Rule("exact again"), Rule("another")
Score = Callable[[Known], torch.Tensor]  # [n], what has more of it is computed first
SCORES: dict[str, Score] = {
    "deviation": lambda known: known.probed.deviation,
    "first": lambda known: -since_break(known.probed.source),
    "last": lambda known: torch.arange(known.count).float(),
    "attended": lambda known: known.probed.attended,
    "attended x deviation": lambda known: known.probed.attended * known.probed.deviation,
    "spread x deviation": lambda known: known.probed.spread * known.probed.deviation,
    "oracle": lambda known: known.probed.attended * known.moved,
}
NOTHING, NUMBERS = "nothing", "numbers"


def since_break(source: torch.Tensor) -> torch.Tensor:
    """``[n]`` float, how many tokens before it follow each other as in the donor."""
    found, length = [], 0
    for place, at in enumerate(source.tolist()):
        follows = place > 0 and at >= 0 and at == int(source[place - 1]) + 1
        length = length + 1 if follows else 0
        found.append(float(length))
    return torch.tensor(found)


def chosen(known: Known, rule: Rule) -> torch.Tensor:
    """Bool ``[n]``, what a rule computes: its share of what could be taken over, with what follows a break."""
    source = known.probed.source
    candidate, result = source >= 0, after_breaks(source)
    if rule.name == NUMBERS:
        result = result | beside(known.number)
    elif rule.share is not None:
        left = int(rule.share * int(candidate.sum())) - int(result.sum())
        score = SCORES[rule.name](known).masked_fill(~candidate | result, -math.inf)
        result[score.topk(max(0, left)).indices] = True
    result |= ~candidate
    result[-1] = True
    return result


def beside(number: torch.Tensor) -> torch.Tensor:
    """Numbers and the tokens beside them."""
    result = number.clone()
    for distance in range(1, BESIDE[0] + 1):
        result[:-distance] |= number[distance:]
    for distance in range(1, BESIDE[1] + 1):
        result[distance:] |= number[:-distance]
    return result


# --- what is read -----------------------------------------------------------------------------------------------------


def texts(kind: str, count: int, material: int, tokens_of: Callable[[str], int], seed: int) -> Iterator[Text]:
    """Prompts of a kind with about so many tokens of material."""
    for index in range(count):
        source = random.Random(f"{seed} {kind} {index}")
        (body, answer), (other, _) = (_BODIES[kind](source, material, tokens_of) for _ in "12")
        first, second = source.sample(OPENINGS, 2)
        yield Text(f"{first}\n\n{body}", f"{second}\n\n{body}", f"{second}\n\n{other}", answer)


def _words(source: random.Random, material: int, tokens_of: Callable[[str], int]) -> tuple[str, str]:
    lines = _filled(source.sample(FILLER, len(FILLER)), " ", material, tokens_of)
    asked = source.choice(lines)
    begin = " ".join(asked.split()[:4])
    return f"{' '.join(lines)}\n\nRepeat the sentence that begins with '{begin}', word by word.", asked


def _problems(source: random.Random, material: int, tokens_of: Callable[[str], int]) -> tuple[str, str]:
    asked, *rest = source.sample(load_problems(GSM8K, ALL_ITEMS), ALL_ITEMS)
    worked = _filled([with_solution(one) for one in rest], "\n\n", material, tokens_of)
    question, answer = with_solution(asked).split("\n", 1)
    return "\n\n".join((*worked, question)), answer


def _arithmetic(source: random.Random, material: int, tokens_of: Callable[[str], int]) -> tuple[str, str]:
    sums = [_sum(source) for _ in range(1 + material // 20)]
    worked = _filled([f"Sum: {asked}\n{steps}" for asked, steps in sums[1:]], "\n\n", material, tokens_of)
    return "\n\n".join((*worked, f"Sum: {sums[0][0]}")), sums[0][1]


def _sum(source: random.Random) -> tuple[str, str]:
    terms = [source.randint(10, 99) for _ in range(source.randint(3, 5))]
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}")
        total += term
    return " + ".join(map(str, terms)), f"{', '.join(steps)}. The answer is {total}."


def _filled(parts: Sequence[str], between: str, material: int, tokens_of: Callable[[str], int]) -> list[str]:
    """As many of the parts as have about so many tokens, at least one."""
    taken = [parts[0]]
    for part in parts[1:]:
        if tokens_of(between.join([*taken, part])) > material:
            break
        taken.append(part)
    return taken


_BODIES = {"words": _words, "problems": _problems, "arithmetic": _arithmetic}


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """The right text, read after a prompt whose KV is not exact.

    Attributes:
        computed: share of the prompt's tokens that went through all layers.
        kl, loss: nats a token.
        equal: whether every most likely successor is that on exact KV.
    """

    computed: float
    kl: float
    loss: float
    equal: bool


class Reader:
    """Reads texts with a model, exactly and blended."""

    def __init__(self, model_path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = resolve_model(model_path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.eager, self.probe = EagerLlama(model), probed_of(model.config.num_hidden_layers)

    def tokens_of(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, message: str) -> list[int]:
        """A user's message, up to where the assistant begins."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(message, add_special_tokens=False))
        chat = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def read(self, text: Text, rules: Sequence[Rule], most: int) -> dict[Rule, Read]:
        """What each rule makes of a text, of whose answer so many tokens are read at most."""
        donor, branch, other = map(self.prompt, (text.donor, text.branch, text.other))
        after = self.tokenizer.encode(text.answer, add_special_tokens=False)[:most]
        theirs, exact = self.eager.prefill(donor), self.eager.prefill([*branch, *after], tail=len(after) + 1)
        aligned = torch.from_numpy(align(donor, branch, DEFAULT_MINIMUM_SPAN).source)
        whole = torch.arange(len(branch))
        known = self._known(branch, exact, theirs, aligned)
        found = {}
        for rule in rules:
            given: tuple[EagerResult, torch.Tensor, Choice] = (theirs, aligned, partial(known, rule))
            if rule == AGAIN:
                given = (exact, whole, only_last)
            elif rule == CONTROL:
                given = (self.eager.prefill(other), whole.clamp(max=len(other) - 1), only_last)
            blended = self.eager.blend(branch, *given, probe=self.probe, after=after)
            found[rule] = compared(exact, blended, after)
        return found

    def _known(
        self, branch: Sequence[int], exact: EagerResult, theirs: EagerResult, aligned: torch.Tensor
    ) -> Callable[[Rule, Probed], torch.Tensor]:
        """What a rule chooses of a branch."""
        digits = [any(map(str.isdigit, self.tokenizer.decode([one]))) for one in branch]
        moved = torch.zeros(len(branch))
        for ours, others in zip(exact.kv[self.probe :], theirs.kv[self.probe :], strict=True):
            for own, other in zip(ours, others, strict=True):
                there = other[aligned.clamp(min=0)].flatten(1)
                moved += (own[: len(branch)].flatten(1) - there).norm(dim=1) / there.norm(dim=1)

        def choose(rule: Rule, probed: Probed) -> torch.Tensor:
            return chosen(Known(probed, torch.tensor(digits), moved), rule)

        return choose


def only_last(probed: Probed) -> torch.Tensor:
    """All but the last token is taken over."""
    result = torch.zeros(len(probed.source), dtype=torch.bool)
    result[-1] = True
    return result


def compared(exact: EagerResult, blended: EagerResult, after: Sequence[int]) -> Read:
    """What was read on blended KV beside what was read on exact KV."""
    right, found = exact.logits.log_softmax(-1), blended.logits.log_softmax(-1)
    kl = (right.exp() * (right - found)).sum(-1)
    said = torch.tensor(after)[:, None]
    loss = right[:-1].gather(1, said) - found[:-1].gather(1, said)
    prompt = blended.computed[: len(blended.computed) - len(after)]
    equal = bool((right.argmax(-1) == found.argmax(-1)).all())
    return Read(float(prompt.float().mean()), float(kl.mean()), float(loss.mean()), equal)


def figures(reads: Sequence[Read]) -> dict[str, Any]:
    """Means over prompts, with the standard error where it says something."""
    losses, kls = [one.loss for one in reads], [one.kl for one in reads]
    several = len(reads) > 1
    return {
        "computed": round(statistics.fmean(one.computed for one in reads), 4),
        "kl": round(statistics.fmean(kls), 6),
        "kl_median": round(statistics.median(kls), 6),
        "loss": round(statistics.fmean(losses), 5),
        "loss_error": round(statistics.stdev(losses) / math.sqrt(len(losses)), 5) if several else None,
        "equal": round(statistics.fmean(one.equal for one in reads), 4),
        "prompts": len(reads),
    }


def measure(reader: Reader, rules: Sequence[Rule], options: argparse.Namespace) -> dict[str, dict[Rule, list[Read]]]:
    """What every rule makes of every text, by kind."""
    found: dict[str, dict[Rule, list[Read]]] = {kind: {rule: [] for rule in rules} for kind in options.kinds}
    with tqdm(total=options.prompts * len(options.kinds), desc="prompts", file=sys.stderr) as bar:
        for kind, by_rule in found.items():
            for text in texts(kind, options.prompts, options.material, reader.tokens_of, options.seed):
                for rule, read in reader.read(text, rules, options.tokens).items():
                    by_rule[rule].append(read)
                bar.update()
    return found


def summary(found: Mapping[str, Mapping[Rule, Sequence[Read]]], options: argparse.Namespace) -> dict[str, Any]:
    """The last line."""
    return {
        "kinds": {kind: {str(rule): figures(reads) for rule, reads in rules.items()} for kind, rules in found.items()},
        "model": options.model_path,
        "prompts": options.prompts,
        "material": options.material,
        "tokens": options.tokens,
        "seed": options.seed,
    }


def show(result: Mapping[str, Any]) -> None:
    """A table a kind for people."""
    for kind, rules in result["kinds"].items():
        table = Table("rule", "computed", "KL", "median", "loss", "equal", title=f"{kind}, {result['prompts']} prompts")
        for rule, one in rules.items():
            error = "" if one["loss_error"] is None else f" ± {one['loss_error']:.4f}"
            loss = f"{one['loss']:+.4f}{error}"
            table.add_row(
                rule,
                f"{one['computed']:.1%}",
                f"{one['kl']:.5f}",
                f"{one['kl_median']:.5f}",
                loss,
                f"{one['equal']:.0%}",
            )
        Console(stderr=True, width=120).print(table)


def rules_of(names: Sequence[str], shares: Sequence[float]) -> list[Rule]:
    """Every rule at every share, noise and control last."""
    plain = [Rule(name) for name in (NOTHING, NUMBERS) if name in names]
    scored = [Rule(name, share) for name in SCORES if name in names for share in shares]
    return [*plain, *scored, AGAIN, CONTROL]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.blend_rules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (NOTHING, NUMBERS, *SCORES)
    parser.add_argument(
        "--model-path", default=DEFAULT_MODEL, help="Llama or Qwen2; read in float32, four bytes a weight"
    )
    parser.add_argument("--rules", nargs="+", choices=names, default=names, metavar="RULE", help=", ".join(names))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of what could be taken over")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--material", type=int, default=600, help="tokens that donor and branch share, about")
    parser.add_argument("--tokens", type=int, default=64, help="of the right text that are read at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.prompts, options.material, options.tokens) < 1:
        parser.error("--prompts, --material, --tokens: must be 1 or more")
    if not all(0.0 <= share <= 1.0 for share in options.shares):
        parser.error(f"--shares: must be from 0 to 1, got {options.shares}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        reader = Reader(options.model_path)
        found = measure(reader, rules_of(options.rules, options.shares), options)
    except RkscError as error:
        print(f"blend_rules: {error}", file=sys.stderr)
        return 1
    result = summary(found, options)
    show(result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
