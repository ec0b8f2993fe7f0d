"""Sets of branches that begin otherwise, read the same material and are asked for facts of it.

A set has one material of about a thousand tokens: twelve facts, each a sentence of its own pattern about a name of its
own, among sentences of other things. Facts are numbers, names, negations, units and dates; every second branch has some
others. A prompt ends with the words of the fact's own sentence up to what it says, so that the next tokens are the
answer.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from programs.asking import opened

CHANGED = 4  # facts of every second branch that are others than the first branch's
LEAST, MOST = 100, 999  # of the numbers

OPENINGS = (  # the longest first, so that what the others take over stands at positions that they can have
    "Here is a long report. It is not in any order. At its end there is a question on one of its lines.",
    "You are given the chronicle of a county. Use nothing else to answer what is asked at the end.",
    "Below is what a traveller wrote down last spring. Someone wants to know one number from it.",
    "These lines come from an old almanac. Look up what is asked after them and reply briefly.",
    "A clerk has copied the following text by hand. Please find the entry that the question is about.",
    "Read the notes below with care, then answer the question about them.",
    "Consider the records that follow; they are complete and correct. Then give the number that is asked for.",
    "The text after this sentence holds everything that you need. Do not guess, look it up, and answer.",
)
PEOPLE = (
    *("Tamsin Oakes", "Barnaby Quill", "Ottoline Reyes", "Cosmo Vandermeer", "Philippa Thorne", "Ezra Lindqvist"),
    *("Marguerite Bloom", "Caspian Holt", "Rosalind Achterberg", "Leopold Finch", "Winifred Castellan", "Jasper Okoro"),
    *("Henrietta Moss", "Ambrose Tully", "Clementine Vasquez", "Thaddeus Birch"),
)
PLACES = (
    *("Ardmore", "Belcroft", "Kestrel Bay", "Wolverdale", "Saint Imelda", "Dunmarrow", "Pinehollow", "Grizedale"),
    *("Larkspur", "Ottersby", "Marazion", "Velmont", "Quarrington", "Thistlewick", "Brackenford", "Osmundsey"),
)
NUMBER, NAME, NEGATION, UNIT, DATE = KINDS = ("number", "name", "negation", "unit", "date")
HOW_MANY = {NUMBER: 4, NAME: 2, NEGATION: 2, UNIT: 2, DATE: 2}  # facts of a set
FACTS = sum(HOW_MANY.values())
NAMES = ("Halloran", "Brindle", "Castellane", "Dunmore", "Eversley", "Farrow", "Gadsby", "Hathersage")
COINS, LENGTHS = ("crowns", "dollars", "guilders", "shillings"), ("feet", "yards", "metres", "cubits")
MONTHS = ("January", "February", "March", "April", "June", "July", "August", "September", "October", "November")


@dataclass(frozen=True)
class Line:
    """The sentence of a fact.

    Attributes:
        kind: of what it says.
        text: with a place for the name that it is about, and one for what it says of it.
        question: that it answers.
        values: what it may say; empty for a number.
    """

    kind: str
    text: str
    question: str
    values: tuple[str, ...] = ()


LINES_ON_PEOPLE = (
    Line(
        NUMBER,
        "{name} keeps her tools in locker {value} behind the boiler.",
        "In which locker does {name} keep her tools?",
    ),
    Line(
        NUMBER,
        "The violin of {name} is insured under policy {value} with a bank.",
        "Which policy has the violin of {name}?",
    ),
    Line(NUMBER, "{name} planted {value} apple trees above the mill.", "How many apple trees did {name} plant?"),
    Line(
        NUMBER,
        "The parcel for {name} weighed {value} grams when it was posted.",
        "How heavy was the parcel for {name}?",
    ),
    Line(
        NUMBER, "{name} sailed around the cape in {value} hours without a stop.", "In how many hours did {name} sail?"
    ),
    Line(NUMBER, "The thesis of {name} has {value} pages and no pictures.", "How many pages has the thesis of {name}?"),
    Line(NUMBER, "{name} sold {value} jars of honey at the autumn fair.", "How many jars of honey did {name} sell?"),
    Line(NUMBER, "The telephone extension of {name} is {value} since the move.", "What is the extension of {name}?"),
    Line(NAME, "The lute of {name} was built by {value} in a cellar.", "Who built the lute of {name}?", NAMES),
    Line(NAME, "{name} learned to swim from {value} as a child.", "From whom did {name} learn to swim?", NAMES),
    Line(NEGATION, "{name} {value} meat on a Friday.", "Does {name} eat meat on a Friday?", ("eats", "never eats")),
    Line(NEGATION, "{name} {value} to lend books to strangers.", "Does {name} lend books?", ("agreed", "refused")),
    Line(UNIT, "{name} bought a boat for forty {value} and a lamp.", "For what did {name} buy a boat?", COINS),
    Line(DATE, "{name} was married in {value} in the garden.", "In which month was {name} married?", MONTHS),
)
LINES_ON_PLACES = (
    Line(
        NUMBER,
        "The lighthouse at {name} stands {value} feet above the water.",
        "How high stands the lighthouse at {name}?",
    ),
    Line(NUMBER, "The school in {name} has {value} pupils this year.", "How many pupils has the school in {name}?"),
    Line(NUMBER, "The road to {name} climbs {value} metres through the forest.", "How far climbs the road to {name}?"),
    Line(
        NUMBER,
        "The library of {name} lends {value} books in a usual week.",
        "How many books lends the library of {name}?",
    ),
    Line(
        NUMBER,
        "The bell of {name} was cast from {value} pounds of bronze.",
        "From how much bronze is the bell of {name}?",
    ),
    Line(NUMBER, "The bus to {name} shows the number {value} on its front.", "Which number shows the bus to {name}?"),
    Line(
        NUMBER,
        "The theatre in {name} seats {value} people on two floors.",
        "How many people seats the theatre in {name}?",
    ),
    Line(
        NUMBER, "The bridge at {name} rests on {value} wooden piles.", "On how many piles rests the bridge at {name}?"
    ),
    Line(
        NAME, "The chapel of {name} is called after {value} since the war.", "After whom is the chapel called?", NAMES
    ),
    Line(NAME, "The ferry at {name} belongs to {value} and his sons.", "To whom belongs the ferry at {name}?", NAMES),
    Line(
        NEGATION,
        "The gate of {name} {value} after sunset.",
        "Is the gate of {name} locked?",
        ("is locked", "is not locked"),
    ),
    Line(
        NEGATION,
        "The well of {name} {value} in autumn.",
        "Does the well of {name} run dry?",
        ("runs dry", "never runs dry"),
    ),
    Line(UNIT, "The anchor at {name} is nine {value} long and rusty.", "How long is the anchor at {name}?", LENGTHS),
    Line(DATE, "The fair of {name} opens in {value} every year.", "When opens the fair of {name}?", MONTHS),
)
FILLER = (
    "Rain fell for most of the week, and the lower meadows were too wet for the sheep to graze on.",
    "A baker from the coast opened a small shop near the station and is already known for rye bread.",
    "Nobody remembers who carved the oak door of the town hall, though many families claim the honour.",
    "The orchestra rehearses on Mondays because the hall is used for dancing on every other evening.",
    "An owl has nested in the old clock tower, so the keeper winds the clock as quietly as he can.",
    "Travellers say that the inn by the crossroads serves the best onion soup between the two rivers.",
    "The council argued about street lamps until midnight and went home without having decided anything.",
    "In the museum there is a painted globe on which the southern seas are filled with whales.",
    "Children gather chestnuts in the park and trade them for marbles behind the bicycle shed.",
    "The doctor prefers to walk to her patients, even in winter, and carries a lantern after dusk.",
    "A storm tore the roof from the boathouse, and the rowing club now meets in a barn.",
    "The schoolmaster writes short poems about vegetables, which are printed in the Sunday paper.",
    "Fishermen mend their nets on the quay and tell visitors stories that change with every telling.",
    "The gardener grafts pears onto quince stock and keeps a careful diary of what succeeds.",
    "Some of the vineyards were replanted after the frost, but the oldest vines survived it.",
    "A retired engineer repairs radios for his neighbours and refuses to be paid for it.",
    "The river freezes rarely, yet every household still owns a pair of skates in case it does.",
    "Tourists photograph the painted shutters of the market square and seldom look at the market itself.",
    "The carpenter built a cradle without a single nail and gave it to the youngest couple in the village.",
    "On clear nights the astronomers invite anyone who is awake to look through their telescope.",
    "The post arrives late on Fridays, since the driver visits his mother at the end of the valley.",
    "Goats were brought to the hillside to eat the brambles, and they ate the roses as well.",
    "The tailor keeps buttons of every colour in glass drawers that glitter when the sun comes in.",
    "A choir of beekeepers sings at weddings, always in three parts and never on time.",
    "The potter digs her clay from the bank of the stream and lets it rest for a whole summer.",
    "Two brothers run the sawmill and have not spoken to each other since the flood.",
    "The new teacher of geography lets her classes draw maps of places that do not exist.",
    "Wild garlic grows along the footpath, and in May one can find the way by its scent alone.",
    "The printer still sets the festival posters by hand, with wooden letters from his grandfather.",
    "Snow closed the upper pass early, so the cheese had to be brought down on sledges.",
    "A painter rents the attic above the pharmacy and complains about pigeons in every letter home.",
    "The swimming bath was drained for cleaning, and a wedding ring was found beneath the ladder.",
    "The mayor promised a new fountain and planted a lime tree there instead, to general relief.",
    "Apprentices at the forge learn to make hinges first and are allowed to make knives much later.",
    "The widow at the corner feeds every cat in the street but lets none of them into her kitchen.",
    "A group of students restored the windmill and grinds flour in it on the first day of autumn.",
    "The chess club plays outdoors as soon as the almond trees are in blossom, whatever the weather.",
    "Old sailors recommend the narrow channel north of the island, provided that the tide is rising.",
    "The weaver dyes her wool with walnut shells, and her hands stay brown until Christmas.",
    "A film was shot in the monastery last year, and the monks were paid with a new oven.",
)
WHEN = (  # longer materials have each line again, at other times
    *("In a wet summer", "As the almanac tells it", "Long before the railway", "After the great fire", "Most winters"),
    *("To nobody's surprise", "According to the miller", "In the year of the comet", "Since the bridge fell"),
    *("On the far bank", "While the market was closed", "Under the last mayor", "By the light of a lamp"),
)
USUAL = 1000  # tokens of a material that has every line once, about
LINE = 25  # tokens of one more line, about
MOST_MATERIAL = USUAL + LINE * len(WHEN) * len(FILLER)


@dataclass(frozen=True)
class Item:
    """One prompt and what answers it.

    Attributes:
        prompt: complete, up to the answer.
        kind: of the fact.
        answer: what the branch's material says.
        donors: what the same fact says in the set's first branch.
    """

    prompt: str
    kind: str
    answer: str
    donors: str

    @property
    def changed(self) -> bool:
        """Whether the first branch says otherwise."""
        return self.answer != self.donors


@dataclass(frozen=True)
class _Fact:
    line: Line  # about somebody

    @property
    def start(self) -> str:
        """The line up to what it says; a number stands after a space, a word brings its own."""
        start = self.line.text.split("{value}")[0]
        return start if self.line.kind == NUMBER else start.rstrip()

    def other(self, source: random.Random, than: str, numbers: Collection[str]) -> str:
        """Something else that it might say, and none of the numbers."""
        if self.line.values:
            return source.choice([value for value in self.line.values if value != than])
        return source.choice([str(one) for one in range(LEAST, MOST + 1) if str(one) not in numbers])


def branches_of(seed: int, template: Any, questions: int, material: int = USUAL) -> list[list[Item]]:
    """A set: for each of eight openings the prompts that ask for ``questions`` facts (1 to 4), one each.

    Branches of even index have the first branch's facts and are asked the first branch's first question first. In those
    of odd index :data:`CHANGED` facts are others; questions for those, the first included, take turns with others.

    Args:
        template: SGLang's ``ChatTemplate``.
        material: its tokens, about; from :data:`USUAL` to :data:`MOST_MATERIAL`.
    """
    source = random.Random(seed)
    filler = _filler(source, material)
    facts = _facts(source)
    numbers = iter(source.sample(range(LEAST, MOST + 1), FACTS))
    said = [source.choice(fact.line.values) if fact.line.values else str(next(numbers)) for fact in facts]
    order = source.sample([*range(FACTS), *filler], FACTS + len(filler))
    asked_first = source.randrange(FACTS)
    result = []
    for index, opening in enumerate(OPENINGS):
        own = list(said)
        changed = source.sample(range(FACTS), CHANGED) if index % 2 else []
        for fact in changed:
            own[fact] = facts[fact].other(source, said[fact], {*said, *own})
        lines = [facts[one].line.text.format(value=own[one]) if isinstance(one, int) else one for one in order]
        text = f"{opening}\n\n{' '.join(lines)}\n\n"
        asked = _asked(source, changed, asked_first, questions)
        result.append([_item(template, text, facts[one], own[one], said[one]) for one in asked])
    return result


def _filler(source: random.Random, material: int) -> list[str]:
    """Lines without facts."""
    more = [f"{when}, {line[0].lower()}{line[1:]}" for when in WHEN for line in FILLER]
    return [*FILLER, *source.sample(more, (material - USUAL) // LINE)]


def _facts(source: random.Random) -> list[_Fact]:
    """Some lines of each kind, each about a name of its own."""
    people, places = (iter(source.sample(names, len(names))) for names in (PEOPLE, PLACES))
    chosen = []
    for kind, count in HOW_MANY.items():
        lines = [(one, names) for of, names in ((LINES_ON_PEOPLE, people), (LINES_ON_PLACES, places)) for one in of]
        chosen += source.sample([pair for pair in lines if pair[0].kind == kind], count)
    facts = []
    for line, names in source.sample(chosen, len(chosen)):
        name = next(names)
        text, question = (part.replace("{name}", name) for part in (line.text, line.question))
        facts.append(_Fact(replace(line, text=text, question=question)))
    return facts


def _asked(source: random.Random, changed: list[int], first: int, questions: int) -> list[int]:
    """Which facts a branch is asked for, each once."""
    if not changed:
        return [first, *source.sample([fact for fact in range(FACTS) if fact != first], questions - 1)]
    same = [fact for fact in range(FACTS) if fact not in changed]
    by_turns = zip(source.sample(changed, CHANGED), source.sample(same, CHANGED), strict=True)
    return [fact for pair in by_turns for fact in pair][:questions]


def _item(template: Any, text: str, fact: _Fact, own: str, first: str) -> Item:
    messages = [{"role": "user", "content": text + fact.line.question}]
    return Item(opened(template, messages) + fact.start, fact.line.kind, own, first)
