"""Metrics of an output against its gold answers, as pure functions of strings."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.helpers import extract_all_char_ngrams

CHRF_ORDER = 6
CHRF_BETA = 2
EDGE_MARKS = " \t\n.,;:!?\"'`()[]“”‘’"


def normalize_squad(text: str) -> str:
    """Lower case without punctuation, articles and repeated spaces, as in the official SQuAD 1.1 script."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if the output equals an answer after `normalize_squad`."""
    return float(any(normalize_squad(output) == normalize_squad(answer) for answer in answers))


def f1(output: str, answers: Sequence[str]) -> float:
    """The best token F1 over the answers, as in the SQuAD 1.1 script."""
    return max(_f1(normalize_squad(output).split(), normalize_squad(answer).split()) for answer in answers)


def _f1(output: list[str], answer: list[str]) -> float:
    common = sum((Counter(output) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(output), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def contains(output: str, answers: Sequence[str]) -> float:
    """1 if an answer occurs in the output as whole words, ignoring case, spaces and outer punctuation.

    A number with a decimal point or thousands comma is one word: `1` is not in `1,000`.
    """
    folded = _fold(output)
    return float(any(_word_pattern(_fold(answer)).search(folded) for answer in answers))


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("’", "'").casefold()
    return " ".join(text.split())


def _word_pattern(answer: str) -> re.Pattern:
    core = answer.strip(EDGE_MARKS) or answer
    before = r"(?<!\w)" + (r"(?<!\d[.,])" if core[0].isdigit() else "")
    after = r"(?!\w)" + (r"(?![.,]\d)" if core[-1].isdigit() else "")
    return re.compile(before + re.escape(core) + after)


def chrf_statistics(output: str, answers: Sequence[str]) -> np.ndarray:
    """Character n-gram counts against the closest answer: float64 `[order, (output, answer, common)]`.

    `chrf_score` of their sum over questions equals sacreBLEU's `corpus_chrf` with its defaults.
    """
    ours = extract_all_char_ngrams(output, CHRF_ORDER, False)
    candidates = [_ngram_statistics(ours, extract_all_char_ngrams(answer, CHRF_ORDER, False))
                  for answer in answers]
    return max(candidates, key=lambda counts: float(chrf_score(counts)))


def _ngram_statistics(ours: list[Counter], theirs: list[Counter]) -> np.ndarray:
    # Output n-grams longer than the answer do not count against precision.
    return np.array([(o.total() if t else 0, t.total(), (o & t).total())
                     for o, t in zip(ours, theirs, strict=True)], float)


def chrf_score(counts: np.ndarray) -> np.ndarray:
    """chrF2 (0 to 100) of summed or averaged statistics `[..., order, 3]`, shape `[...]`."""
    output, answer, common = np.moveaxis(counts, -1, 0)
    present = (output > 0) & (answer > 0)
    orders = np.maximum(present.sum(-1), 1)
    precision = np.where(present, common / np.where(present, output, 1), 0).sum(-1) / orders
    recall = np.where(present, common / np.where(present, answer, 1), 0).sum(-1) / orders
    weight = CHRF_BETA ** 2
    below = weight * precision + recall
    return 100 * (1 + weight) * precision * recall / np.where(below > 0, below, 1)
