"""The text that a proof runs on: made-up notes, and the prompts that are made of them.

Prompts are plain text, so that they are the same for every chat template. They end in a hyphen before the number that
is asked for: whatever the tokenizer, the next token begins the number, and tells right answers from wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass

NUMBER, OTHER_NUMBER = "418", "735"
FIRST_OPENING = "Please read it carefully and answer the question."
SAME_OPENING = "Think step by step, then give the answer."
OTHER_OPENING = (
    "A clerk of the port office copied these entries by hand last spring. Somebody has to look up one shelf mark in "
    "them before noon, so be brief and do not guess."
)
NOTES = """\
Notes on the harbour of Lower Vennick, kept by the warden Ottoline Brask.

The harbour has 3 basins and one dry dock. The oldest basin was dug by the guild of rope makers and silts up on its \
northern side, where the current of the Aune turns back on itself. It is dredged once in spring and once in autumn, \
and the mud is carried to the meadows behind the chapel. The middle basin takes the fishing boats; it has iron rings \
in its walls and a slipway of oak beams that were tarred again after the flood. The newest basin is the deepest, and \
ships with a draught of 6 metres can lie there at any tide.

A lighthouse stands on the eastern mole. It burns 12 oil lamps behind a ring of glass, and the keeper, Tobias Quell, \
winds the clockwork that turns the ring every evening. On a clear night the light is seen from the Sorrel Rocks, and \
in fog a bell is struck by a hammer that the swell itself drives. The keeper is paid $40 a week, has the garden \
behind the tower, and owes the warden a written report on the first day of each month.

Goods are stored in the long warehouse on Tallow Street. Its ground floor holds barrels of salted herring, coils of \
hemp and sacks of barley; the upper floor is kept dry for paper, linen and seeds. The doors are barred at sunset. Two \
dogs, Bramble and Fitch, are let out at night, and neither has ever bitten anybody but the bailiff. Fire buckets hang \
beside each stair, and the pump in the yard is tried every Saturday by the apprentices.

The papers of the harbour are in the archive over the customs hall, and every bundle has a shelf mark. The tide \
tables have the shelf mark H-206. The plans of the dry dock have the shelf mark H-957. The letters of the rope makers \
have the shelf mark H-418. The log of the lighthouse has the shelf mark H-163. The register of drowned sailors has \
the shelf mark H-584. The accounts of the dredging have the shelf mark H-629. Whoever takes a bundle out signs for it \
and brings it back within 5 days.

On market days the ferry to Ostrow crosses every hour. It is a flat boat on a chain, and four men can move it when \
the wind is low. Carts cross for a fee, children for nothing, and geese only in baskets since an accident that the \
ferryman does not like to speak of. In winter, when ice comes down the Aune, the chain is lifted and travellers walk \
round by the mill bridge, which takes them most of an afternoon.

The council meets in the sail loft because its own hall has had no roof since the storm. It has decided to mend the \
mole with granite from Harrow Fell, to plant willows along the towpath, and to buy a second pump. It has not decided \
who pays for the bell rope. The cooper offered to, and then wanted his name cast into the bell.
"""
QUESTION = """
Question: Which shelf mark do the letters of the rope makers have?
Answer: The letters of the rope makers have the shelf mark H-"""
STRAY = """\
Bees of the valley fly out when the sun has warmed the hive wall. A beekeeper from Dunmarrow counted how far they go: \
most visited the lime trees along the canal, some crossed the ridge to a field of clover, and a few were met, marked \
with white paint, in an orchard that nobody would have thought of. Rain kept them at home on most mornings of June. \
The honey of that summer was dark and tasted of mint.

Which colour was the paint? The paint was"""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a proof.

    Attributes:
        first: what the donor of every fork reads.
        other: the same notes and question after another opening: to be blended.
        same: another harmless instruction and other spellings of two numbers: to be merged.
        changed: ``same``, but the number that is asked for is another: never to be merged.
        wrong: ``other`` with that number: what an answer to another prompt looks like.
        stray: another text, which has nothing in common with the notes.
    """

    first: str
    other: str
    same: str
    changed: str
    wrong: str
    stray: str


def prompts() -> Prompts:
    """The prompts; the same ones each time."""
    rest = f"\n\n{NOTES}{QUESTION}"
    spelled = rest.replace("12 oil lamps", "twelve oil lamps").replace("$40 a week", "40 dollars a week")
    return Prompts(
        first=FIRST_OPENING + rest,
        other=OTHER_OPENING + rest,
        same=SAME_OPENING + spelled,
        changed=SAME_OPENING + spelled.replace(f"H-{NUMBER}", f"H-{OTHER_NUMBER}"),
        wrong=OTHER_OPENING + rest.replace(f"H-{NUMBER}", f"H-{OTHER_NUMBER}"),
        stray=STRAY,
    )
