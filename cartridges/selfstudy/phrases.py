"""Finds noun phrases without a tagger: runs of words that, by a dictionary, may be nouns or precede one.

English only. Many results are wrong ("use computer programs"), because recall matters more than precision here.
"""

import re

from cartridges.selfstudy.verbs import main_verb, may_be_noun, may_be_verb

STOP_WORDS = frozenset("""
a about above after again all also although am an and any are as at be because been before being below
between both but by can could did do does during each either even every for from further had has have
having he her here hers him his how however i if in into is it its itself may me might more most must my
neither no nor not now of off often on once only or other our out over own per same she should since so some
such than that the their them themselves then there these they this those through thus to too under until
up upon us very was we were what when where which while who whom whose why will with within without would
yet you your one two there's it's
""".split())  # noqa: SIM905

_ARTICLES = frozenset("the a an its their his her".split())  # noqa: SIM905
PLACES = frozenset("in at on within inside during under near".split())  # noqa: SIM905
"""Prepositions with which answers to where and when begin."""
_LINKS = frozenset("of and or for by with into over along between from".split())  # noqa: SIM905
_TOKEN = re.compile(r"[\w\-%]+(?:['’](?!s\b)\w+)*|['’]s\b|[^\w\s]")
_NOUNS = re.compile(r"p?(?P<article>a?)(?P<nouns>(?<!n)n{1,5}(?!n))(?=(?P<rest>(?:[lp]a?n{1,5}(?!n)){0,3}))")
"""Matches, in a string of word kinds (`_kind`), a noun phrase and the phrases linked to it."""
_LINK = re.compile("[lp]")
_LIST_OF = re.compile(r"(?<![an])(?=(a?n{1,4}(?:,a?n{1,4}){1,8},?la?n{1,4}(?!n)))")


def noun_phrases(text: str) -> list[str]:
    """The noun phrases of `text`: alone, with article and preposition ("in the shallow crust"), with linked phrases
    ("Slave craton in northwestern Canada"), in lists, and parts of them.

    People answer with any of these, and a cartridge finds a phrase unlikely that was never an answer in training.
    """
    words = _TOKEN.findall(text)
    kinds = "".join(map(_kind, words))
    bare, led, longer, parts = [], [], [], []
    for match in _NOUNS.finditer(kinds):
        (start, end), whole = match.span("nouns"), match.end("rest")
        bare.append((start, end))
        led += [(at, end) for at in range(match.start(), start)]
        links = [link.start() for link in _LINK.finditer(kinds, end + 1, whole)]
        longer += [(match.start("article"), cut) for cut in [*links, whole] if cut > end]
        # The run may contain a verb: "Structural geologists use microscopic analysis".
        parts += [(cut, end) for cut in range(max(start + 1, end - 2), end)]
        parts += [(start, cut) for cut in range(start + 1, min(end, start + 3)) if may_be_verb(words[cut])]
    lists = [match.span(1) for match in _LIST_OF.finditer(kinds)]
    found = ((_joined(words[start:end]), words[end - 1], kinds[end:end + 1])
             for start, end in bare + led + lists + longer + parts)
    return [phrase for phrase, last, after in found if phrase in text and _is_noun_phrase(phrase, last, after)]


def head(phrase: str) -> str:
    """`phrase` without preposition, article and linked phrases: "The port number of echo" -> "port number"."""
    words = phrase.split()
    kinds = "".join(map(_kind, words))
    start = len(kinds) - len(kinds.lstrip("pa"))
    link = _LINK.search(kinds, start)
    return " ".join(words[start:link.start() if link else None])


def _is_noun_phrase(phrase: str, last: str, after: str) -> bool:
    """Whether `phrase` is one. `after` is the kind of the next word; before an article, `last` may be a verb."""
    if len(phrase) < 4 or not (may_be_noun(last.lower()) or last[0].isupper()):
        return False
    if after == "a" and may_be_verb(last):
        return False
    verb = main_verb(phrase)
    return verb is None or verb.end == len(phrase)  # "sedimentary rocks": no verb


def _joined(run: list[str]) -> str:
    return re.sub(r" (?=,|['’]s\b)", "", " ".join(run))


def _kind(word: str) -> str:
    """The kind of `word`: a(rticle), p(reposition of place or time), l(ink), n(oun or a word that may precede one), a
    comma, or - for the rest."""
    lower = word.lower()
    if lower in _ARTICLES:
        return "a"
    if lower in PLACES:
        return "p"
    if lower in _LINKS:
        return "l"
    if word == ",":
        return word
    return "-" if lower in STOP_WORDS or not word[0].isalnum() else "n"
