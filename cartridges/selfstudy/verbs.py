"""Finds the verb of an English clause, and its form in a question with "do", by a dictionary.

There is no tagger: a word counts as the verb if the dictionary has it as a form of a verb and its neighbours do
not make it a noun. Wrong guesses give odd questions, which the filter on the teacher's likelihood of the answer
removes later.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import lemminflect

_DETERMINERS = frozenset("""
a an the this that these those his her its their our my your no every each some any""".split())  # noqa: SIM905
_NOUN_BEFORE = _DETERMINERS | frozenset("""
of in on at by for from with to and or many most few other s""".split())  # noqa: SIM905
_VERB_AFTER = _DETERMINERS | frozenset("""
about across after against along around as at away back before between by down during for from had in into
near nearly not off on only onto out over so than them through to toward towards under until up upon with
within without when where while how it him he she they you us me and all both more once twice
again""".split())  # noqa: SIM905


@dataclass(frozen=True)
class Verb:
    """`text[start:end]` is the verb; a question with it has the form "`auxiliary` subject `lemma`"."""

    start: int
    end: int
    lemma: str
    auxiliary: str


def main_verb(text: str) -> Verb | None:
    """The first verb of `text`, which begins with its subject; None if no verb is clear."""
    words = list(re.finditer(r"[\w'’\-]+", text))
    for before, word, after in zip(words, words[1:], [*words[2:], None], strict=False):
        between = text[before.end():word.start()]
        if between != " " or before.group().lower() in _NOUN_BEFORE:
            if between != " " and between.strip():
                return None
            continue
        form = _form(word.group())
        if form and (form[1] == "did" or _may_follow(after)):
            return Verb(word.start(), word.end(), *form)
    return None


def _may_follow(word: re.Match | None) -> bool:
    return (word is None or word.group().lower() in _VERB_AFTER or not word.group()[0].islower()
            or word.group().endswith("ly"))


@lru_cache(maxsize=20000)
def _form(word: str) -> tuple[str, str] | None:
    """`(lemma, "did" or "does")` of an inflected verb, else None."""
    if not word.islower():
        return None
    for lemma in lemminflect.getLemma(word, "VERB"):
        if "VERB" not in lemminflect.getAllLemmas(lemma) or lemma in ("be", "have", "do"):
            continue
        if word in lemminflect.getInflection(lemma, "VBD"):
            return lemma, "did"
        if word != lemma and word in lemminflect.getInflection(lemma, "VBZ"):
            return lemma, "does"
    return None


def has_verb(text: str) -> bool:
    """Whether `text` is a clause: it has a verb that cannot be a participle ("built") or a plural ("walls"), or a verb
    before "that" ("said that the boat")."""
    said, that, _ = text.partition(" that ")
    if that and main_verb(said):
        return True
    verb = main_verb(text)
    return (verb is not None and verb.end < len(text) and verb.auxiliary == "did"
            and not is_participle(text[verb.start:verb.end]))


@lru_cache(maxsize=20000)
def is_participle(word: str) -> bool:
    return any(word in lemminflect.getInflection(lemma, "VBN") and word != lemma
               for lemma in lemminflect.getLemma(word, "VERB") if "VERB" in lemminflect.getAllLemmas(lemma))


def third_person(word: str) -> str | None:
    """The lemma of a verb in the third person ("leaves", "carries"); None for other words."""
    form = _form(word)
    return form[0] if form and form[1] == "does" else None


@lru_cache(maxsize=20000)
def agent_verb(noun: str) -> str | None:
    """The verb of an agent noun: keeper -> keeps. None for nouns that are not derived from a verb."""
    if not noun.endswith(("er", "or")) or not noun.islower() or noun == "master":  # not derived from "mast"
        return None
    stem = noun[:-2]
    for lemma in (stem, noun[:-1], stem[:-1] if stem[-1:] == stem[-2:-1] else stem):
        known = "VERB" in lemminflect.getAllLemmas(lemma) and lemminflect.getInflection(lemma, "VBZ")
        if known and lemma in lemminflect.getLemma(known[0], "VERB"):
            return known[0]
    return None


@lru_cache(maxsize=20000)
def is_word(word: str) -> bool:
    """Whether the lower-case `word` is in the dictionary, so that its capital comes from the start of a sentence."""
    return bool(lemminflect.getAllLemmas(word))


@lru_cache(maxsize=20000)
def may_be_noun(word: str) -> bool:
    """Whether `word` is a noun in the dictionary, or not in it at all (another language, a term), or may be the
    plural of a noun that is in it only as a verb ("logs")."""
    lemmas = lemminflect.getAllLemmas(word)
    return not lemmas or "NOUN" in lemmas or "PROPN" in lemmas or (word.endswith("s") and "VERB" in lemmas)


@lru_cache(maxsize=20000)
def is_plural(word: str) -> bool:
    return word == "people" or word not in lemminflect.getLemma(word, "NOUN")


@lru_cache(maxsize=20000)
def is_unit(word: str) -> bool:
    """Whether "how many `word`" is a possible question: berths and kilometres, not "3 per" or "12 globally"."""
    return word not in _VERB_AFTER | _NOUN_BEFORE and word != "per" and not word.endswith("ly") and may_be_noun(word)


@lru_cache(maxsize=20000)
def may_be_verb(word: str) -> bool:
    return "VERB" in lemminflect.getAllLemmas(word)
