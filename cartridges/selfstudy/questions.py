"""Makes questions from statements by rule: a question whose answer is a given span of a sentence.

A 135M model asks badly and slowly; a rule takes microseconds. English only: for other languages there are
`Cloze`, `Recall` and the model itself (`AnchoredAsked`). The filter on the teacher's likelihood of the span
later drops questions that do not fit it.
"""

import random
import re

from cartridges.selfstudy.phrases import PLACES
from cartridges.selfstudy.question_cleanup import QUESTION_WORD, without_trailing_words, without_unpaired_brackets
from cartridges.selfstudy.spans import DATE, SCALES, YEAR, Statement
from cartridges.selfstudy.table_questions import ask_row, row_sentence
from cartridges.selfstudy.verbs import has_verb, is_participle, is_plural, is_unit, is_word, main_verb

_AUXILIARY = re.compile(
    r"\b(is|was|are|were|has been|have been|had been|can|could|may|might|must|will|would|should|has|had)\b")
_HAVE = frozenset({"has", "had"})
_PERFECT = re.compile(r"^\w+(ed|en|wn|ne)\b")
_PREPOSITIONS = "in|on|at|by|to|of|for|from|with|into|as|near"
_PREPOSITION = re.compile(rf"\b({_PREPOSITIONS}|since|until|after|before)\s*$")
_OF_PERSONS = frozenset(("by", "to", "for", "from", "with"))
"""Prepositions after which a name may be a person's."""
_DETERMINER = re.compile(r"(?i)(^|\s)(the|a|an|its|his|her|their)\s*$")
_LEADING = re.compile(
    r"^((?:in|by|since) (?:1\d{3}|20\d\d)(?=,? )"
    r"|(?:in|on|at|by|since|from|during|after|before|until|near|under|for)\b[^,]{1,60}(?=, )),? (.+)$", re.I)
_ADVERB = "later|then|finally|eventually|afterwards|subsequently|today|now|however|thus"
_OPENING = re.compile(rf"(?i)^(?:(?:{_ADVERB}), |(?:{_ADVERB}|\w+ly,) (?=(?:the|an?|this|these|his|her|its|their)\b))")
"""An adverb before the subject: "Later the company failed"."""
_NO_SUBJECT = re.compile(
    r"(?i)^(by|in|on|at|since|after|before|until|from|during|for|to|with|without|despite|unlike|through|under|as|because"
    r"|due|instead|among|between|along|there|while|when|where|if|so|although|though|that|which|who|and|but|or"
    r"|later|then)\b|\b(there|do|does|did)\b|;")
_JOINS = re.compile(r"(?i)^(?:(?:and|but|or)(?: |$))+")
_OWNS = re.compile(r"^['’]s? ")
_HANGS = re.compile(rf"^({_PREPOSITIONS})\b")
_NUMBER = re.compile(rf"^\d[\d,.:]*(?: (?:{SCALES}))?$")
_SHARE = re.compile(r"^\d[\d,.]*(?: ?%| percent| per cent)$")
_RATE = re.compile(r"^\s*per\b.*")
_MONEY = re.compile(r"^[A-Z]{0,3}[$€£¥]")
_TIME = re.compile(
    r"\b(1\d{3}|20\d\d)s?\b|(day|night|year|week|month|century|decade|period|time|spring|summer|autumn|winter|morning"
    r"|evening|noon|beginning|end|January|February|March|April|May|June|July|August|September|October|November"
    r"|December)s?$")
# Words that are rare in other languages.
_ENGLISH = re.compile(r"(?i)\b(the|of|and|to|is|are|were|by|with|it|they|this|these|has|have)\b")
_MEASURE = re.compile(rf"^(\d[\d,.]*(?: (?:{SCALES}))?)\s+(?!(?:{SCALES}|percent)$)([a-z]+)$")
_OPENERS = frozenset(("The", "A", "An", "Every", "Each", "Some", "In", "On", "At", "All", "If", "While", "When"))
_BUILT = re.compile(r"^an? (?:[\w-]+ ){1,2}(\w+)$")
_LIST = re.compile(r"\b(and|or)\b")
_VAGUE_START = re.compile(r"^(It|He|She|They|This|That|These|Those|There|His|Her|Their|Its|We|You|I|And|But)\b")

MAX_SENTENCE_WORDS = 26
"""For a longer statement the answer is only a clause of it: a small model loses the point in a long answer."""
MAX_GAP_WORDS = 10
"""Most words before the question word of `gap`; half as many may follow it."""
MAX_QUESTION_WORDS = 22
"""Longest question; longer ones come from sentences that the rules do not fit."""


def ask(statement: Statement, span: str, rng: random.Random) -> str | None:
    """A question about `statement` with the answer `span`, or None if no rule fits."""
    if statement.cells:
        return ask_row(statement, span, rng)
    text = _subject_first(_lower_start(statement.text.rstrip(" .!?;:")), span)
    found = _find(text, span)
    if not found or _VAGUE_START.match(statement.text):
        return None
    at = found.start()
    if at == 0:
        word, rest = _subject_word(span, text[len(span):], rng)
        return _finish(f"{word} {rest}")
    # The last resort, because nobody asks with a question word inside the sentence.
    last = [_in_place] if len(text[:at].split()) > 3 and not _clause(text[at + len(span):]) else []
    for rule in (_front, _with_do, *last):
        question = rule(text, at, span, rng)
        if question:
            return _finish(question)
    return None


def gap(statement: Statement, span: str, rng: random.Random) -> str | None:
    """The clause around `span` with a question word in its place, for spans that no rule of `ask` fits. English only.

    The question is clumsy, but a phrase that was never an answer in training remains an unlikely one. None for a
    table row, and for a clause of one or two words.
    """
    found = None if statement.cells else _find(statement.text.rstrip(" .!?;:"), span)
    if not found or not _ENGLISH.search(statement.text):
        return None
    before = re.split(r"[,;:]\s|\(", statement.text[:found.start()])[-1].split()[-MAX_GAP_WORDS:]
    after = _clause(statement.text[found.end():].rstrip(" .!?;:")).split()[:MAX_GAP_WORDS // 2]
    start = _DETERMINER.sub("", " ".join(before))
    word, rest = _word_in_place(span, start, " ".join(["", *after]), rng)
    return _finish(f"{start} {word} {rest}")


def _find(text: str, span: str) -> re.Match | None:
    """The first match of `span` in `text` as whole words and numbers, ignoring case if there is no exact match."""
    pattern = rf"(?<![\w,.]){re.escape(span)}(?!\w|[,.]\w)"
    return re.search(pattern, text) or re.search(pattern, text, re.I)


def sentence(statement: Statement, span: str, question: str) -> str | None:
    """A full sentence with the answer `span` to `question`: the statement itself if it is not too long.

    None for a table row without any other cell than its subject.
    """
    if statement.cells:
        return row_sentence(statement, span, question)
    words = statement.text.split()
    if len(words) <= MAX_SENTENCE_WORDS:
        return statement.text
    clauses = re.split(r"(?<=[;,])\s+", statement.text)
    holding = [clause for clause in clauses if span in clause]
    clause = without_unpaired_brackets(holding[0], re.compile(re.escape(span))).rstrip(" ,;.") if holding else ""
    return clause + "." if len(clause.split()) > 3 else span


def _front(text: str, at: int, span: str, rng: random.Random) -> str | None:
    """The Light Service was founded in 1611 by X -> When was the Light Service founded?"""
    match = _AUXILIARY.search(text)
    if not match or match.end() > at or match.start() == 0 or len(text[:match.start()].split()) > 10:
        return None
    subject, auxiliary = text[:match.start()].strip(), match.group()
    if "," in subject or not _may_be_subject(subject) or has_verb(subject):
        return None
    before, after = text[match.end():at].strip(), text[at + len(span):]
    if _OWNS.match(after) or "," in before or _LIST.search(before) or len(before.split()) > 10:
        return None
    word, before, after = _question_word(span, before, after, rng)
    built = _BUILT.match(before)
    if built and auxiliary in ("is", "was", "are", "were") and is_participle(built.group(1)):
        # "is a barque built in 1871" -> "When was it built?"
        return f"{word} was {subject} {built.group(1)}"
    tail = "" if before and rng.random() < 0.6 else _tail(before, after)
    if auxiliary in _HAVE and not _PERFECT.match(before) and not is_participle(before.partition(" ")[0]):
        # A possession: "has 84 berths" -> "How many berths does the harbour have?"
        return f"{word} {'does' if auxiliary == 'has' else 'did'} {subject} have {before} {tail}"
    return f"{word} {auxiliary} {subject} {before} {tail}"


def _with_do(text: str, at: int, span: str, rng: random.Random) -> str | None:
    """The Golden Fiddle sank in 1774 -> When did the Golden Fiddle sink?"""
    verb = main_verb(text[:at])
    if not verb or "," in text[:at] or len(text[:verb.start].split()) > 10 or _AUXILIARY.search(text[:verb.start]):
        return None
    subject, before, after = text[:verb.start].strip(), text[verb.end:at].strip(), text[at + len(span):]
    if not _may_be_subject(subject) or _OWNS.match(after):
        return None
    if _AUXILIARY.search(before) and is_participle(text[verb.start:verb.end]):
        return None  # "antigens expressed by tumours can": the match is not the verb
    if _LIST.search(before) or len(before.split()) > 10:
        return None
    word, before, after = _question_word(span, before, after, rng)
    tail = "" if rng.random() < 0.5 else _tail(before, after)
    return f"{word} {verb.auxiliary} {subject} {verb.lemma} {before} {tail}"


def _in_place(text: str, at: int, span: str, rng: random.Random) -> str:
    """The mill opened in 1702 -> The mill opened in which year?"""
    start = _DETERMINER.sub("", text[:at].rstrip())
    word, rest = _word_in_place(span, start, text[at + len(span):], rng)
    return f"{start} {word} {_clause(rest)}"


def _may_be_subject(text: str) -> bool:
    return not _NO_SUBJECT.search(text) and text.count('"') % 2 == 0


def _tail(before: str, after: str) -> str:
    """The part of the clause after the span that still fits without it: not a phrase that depends on the span."""
    tail = "" if after.startswith(",") else _clause(after)
    hangs = _HANGS.match(tail)
    return "" if hangs and (hangs.group() == "of" or _PREPOSITION.search(before)) else tail


def _word_in_place(span: str, before: str, after: str, rng: random.Random) -> tuple[str, str]:
    """The question word for the middle of a sentence, and the remaining words after it."""
    if YEAR.fullmatch(span):
        return "which year", after
    if _OWNS.match(after.lstrip()) and span.partition(" ")[0] not in PLACES:
        return "whose", _OWNS.sub("", after.lstrip())
    word, _, rest = _question_word(span, "", after, rng)
    leads = _PREPOSITION.search(before)
    return ("what" if word == "Who" and leads and leads.group(1) not in _OF_PERSONS else word.lower()), rest


def _question_word(span: str, before: str, after: str, rng: random.Random) -> tuple[str, str, str]:
    """The question word for `span`, and the remaining words before and after it."""
    first, _, rest = span.partition(" ")
    if rest and first.lower() in PLACES:
        return ("When" if first.lower() == "during" or _TIME.search(rest) else "Where"), before, after
    before = _DETERMINER.sub("", before)
    preposition = _PREPOSITION.search(before)
    measure = _MEASURE.match(span)
    if measure:
        return f"How many {measure.group(2)}", before, after
    if YEAR.fullmatch(span) and preposition and preposition.group(1) == "in":
        return rng.choice(["When", "In which year", "In what year"]), before[:preposition.start()].strip(), after
    if DATE.fullmatch(span):
        return "When", _PREPOSITION.sub("", before).strip(), after
    if _MONEY.match(span):
        return "What" if preposition else "How much", before, _RATE.sub("", after)
    if _SHARE.match(span):
        return "What share" if after.startswith(" of") else "What", before, after
    if _NUMBER.match(span):
        unit = re.match(r"^\s+([a-z]+)\b(.*)$", after, re.S)
        if unit and is_unit(unit.group(1)):
            asked = "Which year's" if YEAR.fullmatch(span) and not is_plural(unit.group(1)) else "How many"
            return f"{asked} {unit.group(1)}", before, unit.group(2)
        return "What", before, _RATE.sub("", after)
    if span[:1].isupper():
        if preposition and preposition.group(1) in ("in", "on", "at", "to", "from"):
            return "Where", before[:preposition.start()].strip(), after
        return (rng.choice(["Who", "Who", "What"]) if " " in span else rng.choice(["What", "Who"])), before, after
    return "What", before, after


def _subject_word(span: str, after: str, rng: random.Random) -> tuple[str, str]:
    """The question word for a `span` at the start of a sentence, and the remaining words after it."""
    if _OWNS.match(after):
        return "Whose", _OWNS.sub("", after)
    if _NUMBER.match(span):
        return "How many", after
    if measure := _MEASURE.match(span):
        return f"How many {measure.group(2)}", after
    if _MONEY.match(span) or _SHARE.match(span):
        return ("How much" if _MONEY.match(span) else "What share"), after
    return (rng.choice(["Who", "What"]) if span[:1].isupper() else "What"), after


def _clause(text: str) -> str:
    """The beginning of `text` up to the end of the clause."""
    return re.split(r"[,;:]| and | but | which | who ", text, maxsplit=1)[0].strip()


def _lower_start(text: str) -> str:
    """`text` without a capital that its first word has only as the start of the sentence."""
    first, _, rest = text.partition(" ")
    plain = first in _OPENERS or (rest[:1].islower() and first.istitle() and is_word(first.lower()))
    return f"{first.lower()} {rest}" if plain else text


def _subject_first(text: str, span: str) -> str:
    """In 1872, the line was opened -> the line was opened in 1872."""
    opening = _OPENING.match(text)
    if opening and opening.end() <= text.find(span):
        text = _lower_start(text[opening.end():])
    found = _LEADING.match(text)
    if not found:
        return text
    clause = _clause(found.group(2))
    turned = f"{_lower_start(clause)} {found.group(1)[:1].lower()}{found.group(1)[1:]}"
    return turned if span in turned and len(clause.split()) > 2 else text


def _finish(question: str) -> str | None:
    question = _JOINS.sub("", " ".join(without_unpaired_brackets(question, QUESTION_WORD).split()))
    question = without_trailing_words(re.sub(r" (?=[,;:])", "", question))
    words = question.split()
    return question[:1].upper() + question[1:] + "?" if 3 <= len(words) <= MAX_QUESTION_WORDS else None
