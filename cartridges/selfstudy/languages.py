"""What the families must know of a text's language: whether their rules of English fit it, and what its words are where
it is written without spaces."""

import re

UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
            "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff")
"""Of a character class: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
SYLLABLES = UNSPACED + "\uac00-\ud7af"
"""The same and Hangul, which has spaces: about a token a character."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_PARTS = re.compile(f"[{UNSPACED}]|[^{UNSPACED}\\s]+\\s*|\\s+")
_WORDS = re.compile(f"[{SYLLABLES}]|[^{SYLLABLES}\\s]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_BREAKS = re.compile("[的了是在和与及或为被把于从到对以而也都就由\u3041-\u309f]|ที่|และ|ของ|ใน|เป็น|มี|ได้|จาก|โดย|กับ|ให้|ว่า")
"""Between phrases: the commonest particles of Chinese and Thai, and in Japanese all hiragana."""
_UNITS = re.compile(rf"(\d[\d,.:/]*(?<![,.:/]))([\u30a1-\u30ff]+|[{UNSPACED}]{{0,2}})")
_LATIN_NAMES = re.compile(r"[A-Za-z][\w'’\-]*(?:\s[A-Za-z][\w'’\-]*)*", re.ASCII)

_ENGLISH = frozenset("""
the of and to in is that it for was with as by on are be this from at have not which or but his they were an has had
their can will if you we""".split())  # noqa: SIM905
_OTHERS = tuple(frozenset(words.split()) for words in (
    "der und das ist den von mit sich nicht ein eine einer auf für dem im auch als wird bei zu zum zur",  # German
    "le la les et des du est une dans que pour qui sur avec par au pas sont de ce cette aux",  # French
    "el la los las que del una por con para como es más se su al fue en de lo",  # Spanish
    "que uma um para com não da dos das mais foi pelo na ao em é de se por",  # Portuguese
    "il di che la del della un una con sono gli dei alla per è nel si da le",  # Italian
    "de het een van en dat niet zijn met voor aan ook wordt bij door naar te op",  # Dutch
    "och att det som är av för på med den till inte ett har en om",  # Swedish
    "og at det som er af av på med den til ikke et har en de",  # Danish, Norwegian
    "się nie jest że na przez oraz od dla jego są był do",  # Polish
    "se že na je jsou jako byl pro který od do by",  # Czech
    "și în de la cu pe din este care un nu sunt pentru al",  # Romanian
    "ve bir bu da de için ile olarak olan çok gibi daha",  # Turkish
    "ja oli ei että mutta kun hän joka myös ovat sen ovat kuin",  # Finnish
    "az és egy hogy nem volt ez meg csak mint is",  # Hungarian
    "yang dan di ini dengan untuk pada dari adalah tidak dalam itu ke",  # Indonesian, Malay
    "và của là có trong các được cho một người với không",  # Vietnamese
    "ya wa na kwa ni katika za la cha kama",  # Swahili
))
FUNCTION_SHARE = 0.08
"""Of a text's words that its language's commonest must be, to be told for it. Running text has about three times that;
a table or a program has hardly any of any language."""


def is_english(text: str) -> bool:
    """A guess by the commonest words. What says nothing (a table of numbers, a program) counts as English; what is
    mostly in another script, or has more of another language's words than of English, does not."""
    letters = "".join(_LETTERS.findall(text))
    if 2 * len(_LATIN.findall(letters)) < len(letters):
        return False
    words = [word.casefold() for word in _LETTERS.findall(text)]
    english = sum(word in _ENGLISH for word in words)
    others = max(([word for word in words if word in of] for of in _OTHERS), key=len)
    if len(others) > english and len(others) >= FUNCTION_SHARE * len(words) and \
            len(set(others)) >= min(4, 1 + len(words) // 8):
        return False
    accented = sum(letter > "\x7f" for letter in letters)
    return english > 0 or len(words) < 12 or accented < 0.04 * len(letters)


def is_unspaced(text: str) -> bool:
    """Whether more of `text` is written without spaces than with them."""
    return 2 * len(_UNSPACED.findall(text)) > sum(len(run) for run in _LETTERS.findall(text))


def word_count(text: str) -> int:
    """Words, and characters where there are no words to tell."""
    return len(_WORDS.findall(text))


def parts(text: str) -> tuple[list[str], str]:
    """The words of `text`, or where it has none its characters; and what they are joined by."""
    return (_PARTS.findall(text), "") if is_unspaced(text) else (text.split(" "), " ")


def spaced(text: str) -> str:
    """`text` with a space around every character that stands for itself."""
    return _UNSPACED.sub(r" \g<0> ", text)


def unspaced_phrases(text: str) -> list[str]:
    """Numbers (with what follows them, and without), names in Latin letters, and what stands between particles."""
    found = []
    for number, unit in _UNITS.findall(text):
        found += [number + unit, number] if unit else [number]
    found += _LATIN_NAMES.findall(text)
    runs = (run for part in _BREAKS.split(text) for run in re.findall(f"[{UNSPACED}]{{2,}}", part))
    return found + [run for run in runs if len(run) <= 20]
