"""Removes leftovers from questions cut out of statements: unpaired brackets, a trailing "the"."""

import re

QUESTION_WORD = re.compile(r"(?i)\b(what|who|whose|when|where|which|how)\b")
_NEVER_LAST = re.compile(r"\s(?:(?i:the|an|its|their|and|or|but|that|than|because|although|if|such as)|a"
                         r"|[A-Z]{0,3}[$€£¥])$")
_LOOSE = " ,;:-–(/"


def without_unpaired_brackets(text: str, keep: re.Pattern) -> str:
    """`text` without unpaired brackets and quotation marks. The text on the other side of such a bracket than the match
    of `keep` is removed too."""
    while halves := _halves(text):
        at = halves[-1]
        before, after = text[:at], text[at + 1:]
        aside, rest = (after, before) if text[at] == "(" else (before, after)
        text = before + after if keep.search(aside) else rest
    return text if text.count('"') % 2 == 0 else text.replace('"', "")


def _halves(text: str) -> list[int]:
    """Positions of unpaired brackets in `text`."""
    opened, alone = [], []
    for at, sign in enumerate(text):
        if sign == "(":
            opened.append(at)
        elif sign == ")":
            alone += [at] if not opened else []
            del opened[-1:]
    return sorted(alone + opened)


def without_trailing_words(text: str) -> str:
    """`text` without trailing function words: "shrunk, and the" -> "shrunk"."""
    text = text.rstrip(_LOOSE)
    while found := _NEVER_LAST.search(text):
        text = text[:found.start()].rstrip(_LOOSE)
    return text
