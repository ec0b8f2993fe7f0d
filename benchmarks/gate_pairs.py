"""Pairs of prompts that ask the same thing, and pairs that nearly do.

Positives are one real problem in two prompts: under other instructions (``template``), with the same text spelled
otherwise by rule (``wording``), both at once (``both``), or reworded by hand (``paraphrase``). The rules of ``wording``
are partly spellings that the guard knows and partly words that it does not. Negatives are one real problem and the same
one with one thing changed that changes what is asked, or another problem in the same template.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from benchmarks.gate_paraphrases import PARAPHRASES
from programs.problems import PHRASINGS, Problem, load_problems
from rksc_sgl.errors import OptionError

POSITIVE_KINDS = ("template", "wording", "both", "paraphrase")
POSITIVE_SHARES = {"template": 0.45, "wording": 0.24, "both": 0.21, "paraphrase": 0.10}
NEGATIVE_KINDS = (
    "number",
    "name",
    "unit",
    "negation",
    "quantifier",
    "operator",
    "comparison",
    "option_order",
    "other_problem_same_template",
    "reordered_facts",
    "swapped_roles",
    "instruction",
)
OTHER_TEMPLATE = "other_problem_same_template"
UNRELATED = "unrelated"
_CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
_PLAIN_SYSTEM = "You are a helpful assistant."
_TEMPLATES = (
    (_PLAIN_SYSTEM, "{question}"),
    (_PLAIN_SYSTEM, "{question}\n\nPlease reason step by step."),
    ("You are a careful mathematician.", "Solve this problem.\n\n{question}"),
    ("You are a patient math tutor.", "Hi! Could you please help me with this exercise?\n\n{question}\n\nThank you!"),
    (
        "You are an expert in mathematics. Think carefully before you answer.",
        "Question: {question}\nExplain your reasoning and then give the final answer.",
    ),
    ("You are a helpful math assistant.", "Let's think step by step.\n\nProblem: {question}"),
    ("You are a teacher who explains each step clearly.", "{question}\n\nShow your work."),
    (_PLAIN_SYSTEM, "Please read the following problem carefully and solve it.\n\n{question}"),
    (_PLAIN_SYSTEM, "I need help with this task: {question}"),
    ("Answer every question as accurately as you can.", "{question}\nWhat is the answer?"),
    ("You solve word problems.", "Please work through this problem step by step.\n\n{question}\n\nCheck your work."),
    (_PLAIN_SYSTEM, "{question} Take your time, and explain how you got the answer."),
    ("You are a brilliant problem solver.", "Here's one for you:\n\n{question}\n\nGood luck!"),
    (_PLAIN_SYSTEM, "My son brought this home from school and I am stuck. {question} Can you show me the solution?"),
    ("You are a friendly assistant for students who prepare for an exam.", "{question}"),
    (_PLAIN_SYSTEM, "Hello, I would like you to solve the following word problem, please.\n\n{question}"),
    ("Think through the problem before you give an answer.", "{question}\n\nWrite down your reasoning."),
    (_PLAIN_SYSTEM, "{question}\n\nWhat is the final answer? Please show all steps."),
    ("You are a math teacher.", "One of my students got this wrong. Can you solve it for us?\n\n{question}"),
    (_PLAIN_SYSTEM, "Math problem:\n{question}\n\nSolution:"),
)
_DEMANDS_FORM = "'The answer is N'"  # two of the programs' phrasings; who leaves that out asks for another text
TEMPLATES = tuple(_CHAT.format(system=system, user=user) for system, user in _TEMPLATES) + tuple(
    _CHAT.format(system=_PLAIN_SYSTEM, user=phrasing) for phrasing in PHRASINGS if _DEMANDS_FORM not in phrasing
)
_DEMANDS = (
    "Answer in one word.",
    "Answer in French.",
    "Round the result to 2 decimals.",
    "Give only the number, without any explanation.",
    "Do not explain your reasoning.",
    "Give the number of steps.",
    "Give the answer in cents.",
    "End with 'The answer is N'.",
    "Answer with a letter.",
    "Explain the problem instead of solving it.",
    "Report the answer as JSON.",
    "Give the answer twice.",
)


@dataclass(frozen=True)
class Pair:
    """Two whole prompts.

    Attributes:
        donor: the prompt whose KV is there.
        branch: the prompt that might take it.
        kind: one of :data:`POSITIVE_KINDS` or :data:`NEGATIVE_KINDS`, or :data:`UNRELATED`.
    """

    donor: str
    branch: str
    kind: str


def positives(count: int = 240, seed: int = 0) -> list[Pair]:
    """Pairs that ask the same thing, all different; the same ones for the same arguments.

    Raises:
        OptionError: more were asked for than can be made.
    """
    source = random.Random(seed)
    pairs: dict[Pair, None] = {}
    for kind in POSITIVE_KINDS:
        wanted = round(count * POSITIVE_SHARES[kind])
        _collect(pairs, wanted, kind, lambda kind=kind: _positive(kind, source))  # type: ignore[misc]
    _collect(pairs, count - len(pairs), "template", lambda: _positive("template", source))
    return list(pairs)[:count]


def negatives(count: int = 2200, seed: int = 0) -> list[Pair]:
    """Pairs that ask different things, as many of each kind as there can be; the same ones for the same arguments.

    Raises:
        OptionError: more were asked for than can be made.
    """
    source = random.Random(seed)
    changes = {kind: _changes(kind, source) for kind in NEGATIVE_KINDS}
    pairs: dict[Pair, None] = {}
    while len(pairs) < count:
        before = len(pairs)
        for kind in NEGATIVE_KINDS:
            if changes[kind] and len(pairs) < count:
                donor, branch = changes[kind].pop()
                first, second = _two_templates(source, same=kind == OTHER_TEMPLATE or source.random() < 0.5)
                pairs[Pair(_fill(first, donor), _fill(second, branch), kind)] = None
        if len(pairs) == before:
            raise OptionError(f"negatives: {before} can be made, got {count}")
    return list(pairs)


def unrelated(count: int = 150, seed: int = 0) -> list[Pair]:
    """Two different problems at random, each in any template; the same ones for the same arguments."""
    source = random.Random(seed)
    problems = [source.sample(_problems(), 2) for _ in range(count)]
    prompts = [[_fill(source.choice(TEMPLATES), problem.question) for problem in two] for two in problems]
    return [Pair(donor, branch, UNRELATED) for donor, branch in prompts]


def _collect(pairs: dict[Pair, None], wanted: int, kind: str, make: Callable[[], Pair]) -> None:
    made = attempts = 0
    while made < wanted:
        pair = make()
        attempts += 1
        if pair not in pairs and pair.donor != pair.branch:
            pairs[pair] = None
            made += 1
        elif attempts > 100 * wanted:
            raise OptionError(f"positives: no more than {made} of kind {kind} can be made, got {wanted}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _fill(template: str, question: str) -> str:
    return template.replace("{question}", question)


def _two_templates(source: random.Random, same: bool) -> tuple[str, str]:
    first = source.choice(TEMPLATES)
    return (first, first) if same else (first, source.choice([one for one in TEMPLATES if one != first]))


@lru_cache(maxsize=1)
def _problems() -> tuple[Problem, ...]:
    return tuple(load_problems("gsm8k", 100))


# --- positives -------------------------------------------------------------------------------------------------------

_DIGITS = _words("zero one two three four five six seven eight nine ten eleven twelve")
REWORDINGS: tuple[tuple[str, str], ...] = (
    # spellings of the same thing
    (r"(?<![\w.,$/:-])(\d{1,2})(?= [a-z]{3})", "digits"),
    (r"\$(\d+)(?![\d.,])(?! ?(?:worth|bill))", r"\1 dollars"),
    (r"(?<=\d),(?=000\b)", ""),
    (r"(?<=\d)%", " percent"),
    (r"\bdoes not\b", "doesn't"),
    (r"\bdidn't\b", "did not"),
    (r"\bin (?:total|all)(?=\?)", "altogether"),
    (r"\baltogether(?=\?)", "in total"),
    (r"\bkilometers\b", "km"),
    (r"\bkilograms\b", "kg"),
    (r"\bmiles per hour\b", "mph"),
    (r"\bmom\b", "mother"),
    (r"\bkids\b", "children"),
    (r"\bphotographs\b", "photos"),
    # words of the same meaning
    (r"\bgets\b", "receives"),
    (r"\bbuys\b", "purchases"),
    (r"\bdecides to\b", "makes up his mind to"),
    (r"\bAfter that\b", "Afterwards"),
    (r"\bcosts\b", "is priced at"),
    (r"\bcurrently\b", "now"),
    (r"\bHow many (\w+) does (he|she) have\b", r"What number of \1 does \2 have"),
)


def _positive(kind: str, source: random.Random) -> Pair:
    problem = source.choice([one for one in _problems() if kind != "paraphrase" or one.id in PARAPHRASES])
    first, second = _two_templates(source, same=kind == "wording" or (kind == "paraphrase" and source.random() < 0.5))
    question = problem.question
    if kind == "paraphrase":
        question = PARAPHRASES[problem.id]
    elif kind != "template":
        question = reworded(question, source)
        if question == problem.question:
            return Pair("", "", kind)  # nothing to reword; not taken
    return Pair(_fill(first, problem.question), _fill(second, question), kind)


def reworded(question: str, source: random.Random) -> str:
    """The question after one or two rules of :data:`REWORDINGS` that apply to it; itself if none does."""
    fitting = [rule for rule in REWORDINGS if re.search(rule[0], question)]
    for pattern, replacement in source.sample(fitting, min(len(fitting), source.choice((1, 2)))):
        question = re.sub(pattern, _in_words if replacement == "digits" else replacement, question)
    return question


def _in_words(match: re.Match[str]) -> str:
    value = int(match[1])
    return _DIGITS[value] if value < len(_DIGITS) else match[1]


# --- negatives -------------------------------------------------------------------------------------------------------

_NAMES = ("Priya", "Oscar", "Ingrid", "Mateo", "Yusuf", "Greta")
_NOT_NAMES = _words(
    "A AM After Amazon An And Another April Art As At Both But By Calculate Cozy Don Ducks During Each First For "
    "Friday Furniture Green He Her His Homes House How How's I If In It Kennel Last Martha's May Monday Mr Of On "
    "One Out Own PM Pick Prince Sales She Six Some Students Sunday TV Ten That The Their Then There They This "
    "Three Thursday To Today Tuesday Twenty Two United Using Wednesday What What's When While With Your"
)
_SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "unit": (
        ("hours", "minutes"),
        ("minutes", "hours"),
        ("hour", "minute"),
        ("miles", "kilometers"),
        ("kilometers", "miles"),
        ("pounds", "ounces"),
        ("pounds", "kilograms"),
        ("kilograms", "pounds"),
        ("feet", "yards"),
        ("yards", "feet"),
        ("dollars", "cents"),
        ("cents", "dollars"),
        ("days", "weeks"),
        ("day", "week"),
        ("week", "month"),
        ("weeks", "months"),
        ("months", "years"),
        ("month", "week"),
        ("years", "months"),
        ("gallon", "liter"),
        ("liters", "gallons"),
        ("mph", "km/h"),
        ("ounces", "pounds"),
        ("square feet", "feet"),
        ("minute", "hour"),
        ("year", "month"),
    ),
    "negation": (
        ("is", "is not"),
        ("are", "are not"),
        ("was", "wasn't"),
        ("were", "were not"),
        ("can", "cannot"),
        ("could", "couldn't"),
        ("will", "won't"),
        ("would", "would not"),
        ("did", "didn't"),
        ("does", "doesn't"),
        ("do", "don't"),
        ("with", "without"),
        ("decides to", "decides not to"),
        ("wants to", "does not want to"),
        ("had", "never had"),
        ("has", "no longer has"),
        ("have", "don't have"),
        ("except", "including"),
        ("and", "but not"),
        ("or", "nor"),
    ),
    "quantifier": (
        ("each", "all"),
        ("every", "some"),
        ("all", "some"),
        ("all", "most of"),
        ("half", "a quarter"),
        ("half", "all"),
        ("twice", "three times"),
        ("thrice", "twice"),
        ("at least", "at most"),
        ("at least", "exactly"),
        ("both", "one"),
        ("a third", "two thirds"),
        ("a third", "a fourth"),
        ("only", "at least"),
        ("dozen", "score"),
        ("quarter", "third"),
        ("some", "no"),
        ("equally", "unequally"),
        ("many", "few"),
        ("first", "second"),
        ("second", "third"),
        ("doubles", "triples"),
        ("other", "same"),
        ("had", "only had"),
        ("has", "has at least"),
        ("has", "has at most"),
        ("sold", "sold about"),
        ("costs", "costs at least"),
        ("times", "more times"),
        ("the rest", "half the rest"),
    ),
    "comparison": (
        ("more", "fewer"),
        ("more", "less"),
        ("fewer", "more"),
        ("less", "more"),
        ("older", "younger"),
        ("younger", "older"),
        ("before", "after"),
        ("after", "before"),
        ("increase", "decrease"),
        ("increased", "decreased"),
        ("increases", "decreases"),
        ("bought", "sold"),
        ("sold", "bought"),
        ("buys", "sells"),
        ("sells", "buys"),
        ("buy", "sell"),
        ("gave", "received"),
        ("gives", "gets"),
        ("spent", "earned"),
        ("spend", "earn"),
        ("spends", "earns"),
        ("earn", "spend"),
        ("left", "lost"),
        ("total", "average"),
        ("average", "total"),
        ("faster", "slower"),
        ("than", "as"),
        ("from", "to"),
        ("to", "from"),
        ("discount", "surcharge"),
        ("remaining", "first"),
        ("lost", "gained"),
        ("each", "together"),
        ("by", "to"),
        ("per", "after a"),
        ("received", "gave"),
        ("get", "give"),
        ("lighter", "heavier"),
        ("large", "small"),
        ("start", "end"),
        ("save", "spend"),
    ),
}


def _changes(kind: str, source: random.Random) -> list[tuple[str, str]]:
    """Every change of a kind that we can make, shuffled."""
    makers: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "number": _numbers,
        "name": _names,
        "operator": lambda: _operators(source),
        "option_order": lambda: _option_orders(source),
        "other_problem_same_template": _others,
        "reordered_facts": _reordered,
        "swapped_roles": _roles,
        "instruction": _instructions,
    }
    made = makers.get(kind, lambda: _swapped_words(kind))()
    found = [pair for pair in dict.fromkeys(made) if _plain(pair[0]) != _plain(pair[1])]
    source.shuffle(found)
    return found


def _plain(text: str) -> str:
    return " ".join(text.split())


def _numbers() -> Iterator[tuple[str, str]]:
    for problem in _problems():
        text = problem.question
        for match in re.finditer(r"\d+|\b(?:two|three|four|five|six|seven|eight|ten|twenty)\b", text):
            for other in _other_numbers(match[0]):
                yield text, text[: match.start()] + other + text[match.end() :]
        for match in re.finditer(r"(?<=\d)[.,](?=\d)", text):
            yield text, text[: match.start()] + ("" if match[0] == "." else ".") + text[match.end() :]


def _other_numbers(number: str) -> list[str]:
    if number.isdigit():
        return [str(int(number) + 1), number + "0", str(int(number) + 10)]
    words = ["three", "nine", "twelve"]
    return [word for word in words if word != number]


def _found_names(text: str) -> list[str]:
    found = re.findall(r"\b[A-Z][a-z]{2,}\b", text)
    return [name for name in dict.fromkeys(found) if name not in _NOT_NAMES]


def _names() -> Iterator[tuple[str, str]]:
    for number, problem in enumerate(_problems()):
        text = problem.question
        for index, name in enumerate(_found_names(text)):
            other = _NAMES[(number + index) % len(_NAMES)]
            yield text, re.sub(rf"\b{name}\b", other, text)
            yield text, re.sub(rf"\b{name}\b", other, text, count=1)


def _swapped_words(kind: str) -> Iterator[tuple[str, str]]:
    for problem in _problems():
        text = problem.question
        for old, new in _SWAPS[kind]:
            for match in list(re.finditer(rf"(?<![\w'-]){old}(?![\w'’-])", text))[:2]:
                yield text, text[: match.start()] + new + text[match.end() :]
        if kind == "unit" and "$" in text:
            yield text, text.replace("$", "€")
            yield text, text.replace("$", "£", 1)
            yield text, re.sub(r"\$([\d.,]*\d)", r"\1 cents", text, count=1)


def _operators(source: random.Random) -> Iterator[tuple[str, str]]:
    for problem in load_problems("reasoning-gym:basic_arithmetic", 120, seed=1) + load_problems(
        "reasoning-gym:chain_sum", 60, seed=1
    ):
        text = problem.question
        for match in re.finditer(r"(?<=\d|\)| )[-+*/](?= |\d|\()", text):
            other = source.choice([sign for sign in "+-*/" if sign != match[0]])
            yield text, text[: match.start()] + other + text[match.end() :]
    for problem in _problems():
        for old, new in (("%", ""), ("/", "*"), ("%", " dollars"), (" x ", " + ")):
            if old in problem.question:
                yield problem.question, problem.question.replace(old, new, 1)


def _option_orders(source: random.Random) -> Iterator[tuple[str, str]]:
    for problem in _problems():
        right = int(float(problem.reference.replace(",", "")))
        options = source.sample([right, right + 2, right * 2 + 1, right + 10], 4)
        for index in range(3):
            other = [*options]
            other[index], other[index + 1] = other[index + 1], other[index]
            yield _with_options(problem.question, options), _with_options(problem.question, other)


def _with_options(question: str, options: list[int]) -> str:
    return "\n".join([question, *(f"{label}) {value}" for label, value in zip("ABCD", options, strict=True))])


def _others() -> Iterator[tuple[str, str]]:
    problems = _problems()
    for index, problem in enumerate(problems):
        for step in (1, 7, 31):
            yield problem.question, problems[(index + step) % len(problems)].question


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", text.strip())


def _reordered() -> Iterator[tuple[str, str]]:
    """Quantities of two facts exchanged, and events told in another order."""
    for problem in _problems():
        text = problem.question
        numbers = list(re.finditer(r"\d[\d,]*(?:\.\d+)?(?<!,)", text))
        for first, second in pairwise(numbers):
            if first[0] != second[0]:
                middle = text[first.end() : second.start()]
                yield text, text[: first.start()] + second[0] + middle + first[0] + text[second.end() :]
        sentences = _sentences(text)
        for index in range(len(sentences) - 2):
            if re.search(r"\b(?:[Tt]hen|[Aa]fter|[Ll]ater|[Ss]econd|next|now|back|[Aa]nother)\b", sentences[index + 1]):
                moved = [*sentences]
                moved[index], moved[index + 1] = moved[index + 1], moved[index]
                yield " ".join(sentences), " ".join(moved)


def _roles() -> Iterator[tuple[str, str]]:
    """Two people exchanged in the facts but not in the question."""
    for problem in _problems():
        sentences = _sentences(problem.question)
        names = _found_names(problem.question)
        for index, first in enumerate(names):
            for second in names[index + 1 : index + 4]:
                for upto in {len(sentences), max(1, len(sentences) - 1), 1}:
                    facts = _exchanged(" ".join(sentences[:upto]), first, second)
                    yield " ".join(sentences), " ".join([facts, *sentences[upto:]])


def _instructions() -> Iterator[tuple[str, str]]:
    for problem in _problems():
        for demand in _DEMANDS:
            yield problem.question, f"{problem.question}\n{demand}"


def _exchanged(text: str, first: str, second: str) -> str:
    other = {first: second, second: first}
    return re.sub(rf"\b(?:{first}|{second})\b", lambda match: other[match[0]], text)
