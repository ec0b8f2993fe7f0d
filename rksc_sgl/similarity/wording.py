"""The closed word lists of the content guard, and why each of them may be closed.

Lists of three sorts, by what a missing or a needless word does:

- *named*: which kind a word is of. Every word is compared, in a list or not; these lists only choose the reason that
  reports and counters give, so they hold frequent words and no more.
- *forgiven*: two spellings of one thing. A wrong entry would answer the wrong question, so each has its reason, and
  what can be read in two ways is not there. They are applied by :mod:`rksc_sgl.similarity.spellings`.
- *stopping*: words that forbid forgiving. A needless entry costs a prefill, so these lists are generous.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- named: the reason that is given for a difference ----------------------------------------------------------------

KIND_OF_WORD: dict[str, str] = {
    word: kind
    for kind, words in {
        # closed classes of grammar, and verbs of which one is the other's opposite
        "COMPARISON": (
            "more less fewer greater smaller larger higher lower before after older younger taller shorter longer "
            "faster slower heavier lighter increase increases increased decrease decreases decreased gain gained lose "
            "lost buy buys bought sell sells sold give gives gave receive receives received get gets got take takes "
            "took left remaining total sum difference average product per than as up down above below over under "
            "between until since during earlier later add subtract minimum maximum profit loss discount win won spend "
            "spends spent earn earns earned save saved to from into by plus minus"
        ),
        "QUANTIFIER": (
            "all some each every any only both either several many much few most least half twice thrice double "
            "doubles triple triples quarter third thirds fourth fifth sixth seventh eighth ninth tenth dozen pair "
            "couple once times exactly almost about approximately another other others rest whole same equal equally "
            "first second last next"
        ),
        "UNIT": (
            "kilograms kilogram kg grams gram ounces ounce oz pounds pound lb lbs tons ton kilometers kilometer km "
            "meters meter metres metre centimeters cm millimeters mm miles mile yards yard feet foot ft inches inch "
            "liters liter litres litre ml gallons gallon seconds minutes minute hours hour days day weeks week months "
            "month years year dollars dollar euros euro cents cent degrees degree mph"
        ),
        "NEGATION": "not no none never nor neither without except unless cannot nobody nothing nowhere instead",
        "OPERATOR": "percent",
    }.items()
    for word in words.split()
}
SENTENCE_OPENERS = _words(  # with a capital, these are not names at the beginning of a sentence
    "i you he she it we they my your his her its our their this that these those there here a an the if when while "
    "who whom whose what which where why how and or but so then for in on at of with is are was were do does did has "
    "have had can could will would should must let solve think show explain answer give check read find list write "
    "work break take please hi hello thank good problem question solution math"
)

# --- forgiven: numbers in words --------------------------------------------------------------------------------------
# The cardinal numbers of English. "Hundred" and the like count only after a number ("a hundred" has its article), and
# "and" never ("one hundred and five" may be 105 or two numbers).

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
ONES = {word: value for value, word in enumerate(_SMALL.split())}
TENS = {
    word: 10 * value
    for value, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2
    )
}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000, "billion": 1_000_000_000}
NUMBER_WORDS = frozenset(ONES) | frozenset(TENS) | frozenset(SCALES)
KIND_OF_WORD |= dict.fromkeys(NUMBER_WORDS, "NUMBER")

# --- forgiven: units -------------------------------------------------------------------------------------------------
# The abbreviation of a unit is read as its plural (after 1 as its singular). Case is kept: Mm is not mm, ML not ml.
# Left out: lb and the pound sign (weight or money), m (metre, minute or million), in and h (words and variables).

ABBREVIATED_UNITS: dict[str, str] = {
    form: unit
    for unit, forms in {
        "kilogram": "kg kgs",
        "ounce": "oz",
        "kilometer": "km kms",
        "centimeter": "cm",
        "millimeter": "mm",
        "milliliter": "ml",
        "foot": "ft",
        "second": "sec secs",
        "minute": "min mins",
        "hour": "hr hrs",
    }.items()
    for form in forms.split()
}
UNITS_WITHOUT_NUMBER = _words("kg km cm mm")  # "how many km": no word and no name besides
PLURALS = {"foot": "feet"}  # of any other unit: with -s
CLOCK = {"a.m.": "AM", "A.M.": "AM", "AM": "AM", "p.m.": "PM", "P.M.": "PM", "PM": "PM"}  # "am" is a verb too
CURRENCY = {"$": "dollar", "€": "euro"}  # not the pound sign: pounds are a weight too

# --- forgiven: contractions ------------------------------------------------------------------------------------------
# Left out: 's (is, has or of), 'd (had or would), and ain't. "Can not" and "could not" in two words may say that
# somebody need not; so "can't" is "cannot" only, and "couldn't" stays.

_NEGATED = ("do", "does", "did", "is", "are", "was", "were", "has", "have", "had", "would", "should")
CONTRACTIONS: dict[str, tuple[str, ...]] = {
    **{f"{verb}n't": (verb, "not") for verb in _NEGATED},
    "can't": ("cannot",),
    "won't": ("will", "not"),
    **{f"{who}'re": (who, "are") for who in ("you", "we", "they")},
    **{f"{who}'ve": (who, "have") for who in ("i", "you", "we", "they")},
    **{f"{who}'ll": (who, "will") for who in ("i", "you", "he", "she", "it", "we", "they")},
    "i'm": ("i", "am"),
}

# --- forgiven: one word in two spellings -----------------------------------------------------------------------------
# Lower case only (Mom may be a name), and only in a text that uses no other word of the row: who writes both may mean
# both. British and American spelling; family words of children for those of adults; a word and its short form; and
# "purchase", the one entry of another root, which has no meaning that "buy" has not.

SPELLINGS: dict[str, str] = {
    form: row.split()[0]
    for row in (
        "color colour",
        "colors colours",
        "favorite favourite",
        "neighbor neighbour",
        "neighbors neighbours",
        "center centre",
        "toward towards",
        "afterward afterwards",
        "mother mom",
        "father dad",
        "grandmother grandma",
        "grandfather grandpa",
        "photograph photo",
        "photographs photos",
        "buys purchases",
        "bought purchased",
    )
    for form in row.split()
}

# --- stopping: where nothing is forgiven -----------------------------------------------------------------------------

# A text with one of ABOUT_WORDING may ask how something is written or what was said. Then nothing is forgiven at all.

ABOUT_WORDING = _words(
    # the prompt and what was said in it
    "prompt prompts instruction instructions instructed message messages conversation chat context text texts request "
    "requests preceding previous above below paragraph paragraphs sentence sentences line lines stanza verse quote "
    "quoted quotation repeat ignore disregard summarize summarise rephrase paraphrase echo verbatim politely polite "
    "asked told say tone "
    # words and spelling
    "word words spell spells spelled spelt spelling misspelled typo rhyme rhymes syllable syllables vowel vowels "
    "consonant consonants alphabet alphabetical alphabetically uppercase lowercase capitalized pronounce pronounced "
    "pronunciation anagram palindrome acronym abbreviation abbreviate hyphen apostrophe comma commas punctuation "
    "character characters symbol symbols emoji unicode ascii noun nouns verb verbs adjective adverb pronoun plural "
    "singular grammar grammatical grammatically synonym antonym contraction article idiom phrase translate translated "
    "translation dialect british american meaning means "
    # notation and code
    "digit digits numeral numerals binary hexadecimal hex octal roman notation format formatted literal valid syntax "
    "code css html python java javascript sql regex json xml yaml csv function variable string strings token tokens "
    "parse parser compile compiler script"
)
LETTERS = re.compile(  # of a word; letters to a friend are none of these
    r"(?:many|which|what|of|first|second|third|middle|last|each|every|double|capital|single) letters?\b(?! of the\b)"
    r"|\bletters? (?:\w+ )?(?:in|of(?! the\b)|long|does|do|begins?|starts?|ends?|[a-z]\b)",
    re.IGNORECASE,
)
# With one of the next lists in it, no instruction around the question is left out.

READER = _words("you your yours yourself")  # a text with one of these speaks with whoever reads the instructions
POINTED_AT = _words(  # where the text speaks of one that is also in an instruction, it may mean that one
    "assistant tutor teacher mathematician expert solver ai student"
)
POINTING_BACK = _words(  # in a text of one sentence, these may point at an instruction
    "it its this that these those they them both one i me my we us our problem puzzle exercise task question questions "
    "answer solution step steps reasoning work"
)

ASKING = _words("calculate compute find determine evaluate")  # a sentence that begins with one of these is a question
