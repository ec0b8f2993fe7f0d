"""The closed word lists of the content guard, written by hand.

Two kinds of lists pull in opposite directions. Words under *protected* only name what kind of difference was found:
every word that is in no list is compared too. Words under *harmless* may be left out of the comparison, so a word is
there only if a whole sentence of such words cannot change what is asked; when in doubt, leave it out.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- protected: names the difference -------------------------------------------------------------------------------

NEGATION = _words(
    "not no none never nor neither without except unless cannot nobody nothing nowhere excluding besides instead "
    "hardly barely lacks lacking fails failed refuses refused avoid avoids"
)
QUANTIFIER = _words(
    "all some each every any only both either several many much few most half twice thrice double doubles doubled "
    "triple triples tripled quadruple quarter quarters third thirds fourth fifth sixth seventh eighth ninth tenth "
    "halves dozen dozens pair pairs couple once times exactly least almost about approximately nearly roughly another "
    "other others rest whole entire single same equal equally first second last next zero"
)
COMPARISON = _words(
    "more less fewer greater smaller larger bigger higher lower before after older younger taller shorter longer "
    "faster slower heavier lighter cheaper expensive increase increases increased decrease decreases decreased gain "
    "gains gained lose loses lost buy buys bought sell sells sold give gives gave given receive receives received get "
    "gets got take takes took lend lends lent borrow borrows borrowed left remaining remain remains remained total "
    "totals altogether sum difference average mean product per than as up down above below over under within between "
    "until since during earlier later early late add adds added subtract subtracts removed remove minimum maximum "
    "maximal minimal highest lowest most least profit loss discount win wins won spend spends spent earn earns earned "
    "save saves saved to from into onto by against behind ahead combined additional extra additionally plus minus"
)
QUESTION = _words("who whom whose what which when where why how")

# --- units: one name for each, used directly after a number ----------------------------------------------------------

UNIT_FORMS: dict[str, str] = {
    form: unit
    for unit, forms in {
        "kilogram": "kilogram kilograms kg kgs kilogramme kilogrammes",
        "gram": "gram grams",
        "ounce": "ounce ounces oz",
        "pound": "pound pounds",
        "ton": "ton tons",
        "kilometer": "kilometer kilometers kilometre kilometres km kms",
        "meter": "meter meters metre metres",
        "centimeter": "centimeter centimeters centimetre centimetres cm",
        "millimeter": "millimeter millimeters millimetre millimetres mm",
        "mile": "mile miles",
        "yard": "yard yards",
        "foot": "foot feet ft",
        "inch": "inch inches",
        "liter": "liter liters litre litres",
        "milliliter": "milliliter milliliters millilitre millilitres ml",
        "gallon": "gallon gallons",
        "second": "second seconds sec secs",
        "minute": "minute minutes min mins",
        "hour": "hour hours hr hrs",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years",
        "dollar": "dollar dollars",
        "euro": "euro euros",
        "cent": "cent cents",
        "degree": "degree degrees",
        "am": "am AM",
        "pm": "pm PM",
    }.items()
    for form in forms.split()
}
UNIT = frozenset(UNIT_FORMS) - {"am", "AM", "second", "min", "sec"} | {"seconds", "lb", "lbs", "daily", "weekly"}
SPELLINGS: dict[str, str] = {  # where no number stands before them; "kilometer" and "kilometers" then stay apart
    form: unit
    for unit, forms in {
        "kilometers": "km kms kilometres",
        "kilograms": "kg kgs kilogrammes",
        "centimeters": "cm centimetres",
        "millimeters": "mm millimetres",
        "meters": "metres",
        "liters": "litres",
    }.items()
    for form in forms.split()
}
RATE_UNITS = _words("second minute hour day week month year")  # "three times a week" is "three times per week"
CURRENCY = {"$": "dollar", "€": "euro"}  # not the pound sign: pounds are a weight too

# --- numbers in words ------------------------------------------------------------------------------------------------

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

# --- the same word written otherwise ---------------------------------------------------------------------------------

CONTRACTIONS: dict[str, tuple[str, ...]] = {
    "can't": ("can", "not"),
    "cannot": ("can", "not"),
    "won't": ("will", "not"),
    "i'm": ("i", "am"),
    "gonna": ("going", "to"),
}
ENDINGS = {"'re": "are", "'ve": "have", "'ll": "will"}  # 's and 'd stand for several words each and stay as they are

# A word is replaced by its first spelling only if neither text uses two of a row: who writes both may mean both.
SYNONYMS: dict[str, str] = {
    form: row.split()[0]
    for row in (
        "mother mom mum",
        "father dad",
        "grandmother grandma",
        "grandfather grandpa",
        "children kids",
        "television tv TV",
        "bicycle bike",
        "photograph photo",
        "photographs photos",
        "telephone phone",
        "automobile car",
        "color colour",
        "colors colours",
        "favorite favourite",
        "gray grey",
        "neighbor neighbour",
        "neighbors neighbours",
        "center centre",
        "begins starts",
        "began started",
        "large big",
        "buy purchase",
        "buys purchases",
        "bought purchased",
        "small little",
        "afterwards afterward",
        "toward towards",
    )
    for form in row.split()
}
SAME_PHRASES = (  # what must be in a text for the pattern to be tried, the pattern, what is written for it
    ("in total", re.compile(r"\bin total\b"), "altogether"),
    ("in all", re.compile(r"\bin all(?=\s*[?.!])"), "altogether"),
    ("per cent", re.compile(r"(?<=\d )per cent\b"), "percent"),
    ("mph", re.compile(r"(?<=\d)mph\b"), " miles per hour"),
    ("mph", re.compile(r"(?<!\w)mph\b"), "miles per hour"),
)

# --- articles --------------------------------------------------------------------------------------------------------

ARTICLES = _words("a an the")
KEEP_ARTICLE_BEFORE = (  # "a third" and "the third" differ, "few" and "a few" too, and A may be somebody
    NUMBER_WORDS
    | _words("first second third fourth fifth sixth seventh eighth ninth tenth last few little lot bit couple pair")
    | _words("other rest same most least number half quarter is are was has had gets got and or can will does did")
)

# --- harmless: instructions that do not change what is asked ---------------------------------------------------------

_SOLVE = _words(
    "solve solving solved work works working compute calculate think thinking reason reasoning consider read go "
    "help helps answer answers answering respond reply find determine figure tackle finish begin start try "
    "understand make let let's lets"
)
_DELIVER = _words("show state give gives write report explain describe present provide list tell conclude")
_SOLUTION = _words(
    "answer answers solution solutions result results number value reasoning work working calculation calculations "
    "step steps arithmetic logic thinking thoughts computation derivation quantities how"
)
_MATERIAL = _words(
    "problem problems question questions exercise exercises task tasks "
    "puzzle puzzles it this following math maths mathematics word story"
)
_MANNER = _words(
    "careful carefully thorough thoroughly clear clearly step-by-step stepwise logical logically patient patiently "
    "accurate accurately precise precisely detail detailed detailed properly systematically methodically full fully "
    "complete final correct good well kind kindly please thanks thank help helpful friendly expert experienced skilled "
    "great best sure brilliant talented luck"
)
_PERSON = _words(
    "assistant tutor teacher mathematician mathematics math maths ai student students learner reader solver"
)
_GLUE = _words(
    "a an the and then so to for with here is are be am you your me my i we our us it its this that these one's at of "
    "on in out up through need needs needed want would could can will do does should must like who by hello hi hey "
    "have has reach reached got get given asked first here's am stuck"
)

DELIVERING, SOLUTION, MATERIAL = _DELIVER, _SOLUTION, _MATERIAL
HARMLESS = (_SOLVE | _DELIVER | _SOLUTION | _MATERIAL | _MANNER | _PERSON | _GLUE) - _words(
    # each of these can carry a question by itself ("the number of steps", "the first answer", "what is given up")
    "of on in out up at by first does do how who one's would could like student students"
)
HARMLESS_PHRASES = re.compile(
    r"\b(?:"
    + "|".join(
        (
            "step by step",
            "one step at a time",
            "before (?:you answer|answering|you begin|you start|(?:you give|giving) (?:an|the|your) (?:final )?answer)",
            "(?:do|does) (?:your|its) best",
            "(?:could|would|can|will) you",
            "(?:i|we) would like",
            "work(?:ing)? (?:it |this |everything )?(?:out|through)",
            "figure (?:it |this )?out",
            "who (?:explains|shows|solves|answers|helps|works|thinks|reasons)",
            "how you (?:got|reach|reached|found|get|solved|arrive at|arrived at)",
            "(?:each|every) (?:step|calculation)",
            "all (?:the |your )?(?:steps|work|calculations|working)",
            "in detail",
            "in full",
            "in order",
            "(?:check|double-check) (?:your|the) (?:work|answer|arithmetic|calculations|reasoning)",
            "what is the (?:final )?(?:answer|result|solution)",
            "first (?=think|read|work|understand|consider|list|explain|show)",
            "take your time",
            "at the end",
            "good at",
            "take a deep breath",
            "as one number",
            "line by line",
            "think (?:it |this |everything |the problem )?through",
            "read (?:this|it|the problem|the question) (?:twice|again|carefully)",
            "break (?:this|it|the problem|the question) (?:down )?into (?:small |smaller |simple )?(?:steps|parts)",
            "(?:solve|work through) each (?:one|part)",
            "what is (?:being )?asked",
            "asks (?:you )?for help",
            "asks (?:you )?(?:this|the following)",
            "a student (?=asks)",
            "(?:expert|good|great|skilled|experienced|brilliant|talented) (?:in|at)",
            "as (?:accurately|carefully|clearly|precisely|well|thoroughly) as (?:you can|possible)",
            "(?:every|each) (?:question|problem|exercise|task)",
            "(?:short|brief) (?:derivation|explanation)",
            "one for you",
            "walk (?:me|us) through (?=it|this|the solution|your (?:reasoning|solution|steps|work))",
            "thank(?:s| you) in advance",
            "one (?:step )?by one",
            "(?:problem|question|exercise|task) below",
            "(?:i'd|we'd) like",
        )
    )
    + r")\b"
)
PHRASE_WORDS = frozenset(re.findall(r"[a-z']{2,}|\ba\b|\bi\b", HARMLESS_PHRASES.pattern))
SENTENCE_VOCABULARY = HARMLESS | PHRASE_WORDS

# --- content that makes instructions matter --------------------------------------------------------------------------

ASKING = _words("calculate compute find determine evaluate")  # a text with none of these and no "?" asks by instruction
ABOUT_THE_TEXT = _words(
    "prompt instruction instructions message sentence sentences above below paragraph conversation preceding following "
    "previous request"
)
TO_THE_READER = _words("you your yours yourself")

COMMON = (
    NEGATION
    | QUANTIFIER
    | COMPARISON
    | QUESTION
    | NUMBER_WORDS
    | HARMLESS
    | PHRASE_WORDS
    | frozenset(UNIT_FORMS)
    | _words(
        "if he she they his her their there it its when while on in at of for but also because however although "
        "yes no today tomorrow yesterday one this that these those using people boys girls students children friends "
        "ducks apples cars last suppose assume now finally out off each everyone someone altogether was were had did"
    )
)
