"""The sample corpus that the demo builds: of the promised length, and its questions well formed."""

from collections import Counter
from pathlib import Path

import pytest

from cartridges.corpus import load_corpus, load_questions
from cartridges.evaluation.metrics import contains

SAMPLE = Path(__file__).resolve().parents[1] / "workflows" / "sample"
FILES = {"isles": "01-the-isles.md", "harbour": "02-the-harbour.md", "lights": "03-the-lights.md",
         "guilds": "04-guilds-and-feasts.md", "food": "05-food-and-inns.md",
         "ships": "06-ships-and-ferries.md"}


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(SAMPLE / "questions.jsonl"))


def test_corpus_is_between_3000_and_5000_tokens(base_model_dir):
    from transformers import AutoTokenizer

    corpus = load_corpus(str(SAMPLE / "corpus"))
    assert len(corpus.documents) == len(FILES)
    tokens = AutoTokenizer.from_pretrained(base_model_dir).encode(corpus.text, add_special_tokens=False)
    assert 3000 <= len(tokens) <= 5000


def test_questions_are_many_distinct_and_spread_over_the_files(questions):
    assert len(questions) >= 180
    assert len({q.question_id for q in questions}) == len(questions)
    assert len({q.question.lower() for q in questions}) == len(questions)
    by_file = Counter(q.question_id.split("-")[1] for q in questions)
    assert set(by_file) == set(FILES) and min(by_file.values()) >= 25
    tables = sum("-table-" in q.question_id for q in questions)
    assert 0.3 <= tables / len(questions) <= 0.5


def test_every_answer_is_in_its_file_and_not_in_its_question(questions):
    texts = {part: (SAMPLE / "corpus" / name).read_text() for part, name in FILES.items()}
    for q in questions:
        assert contains(texts[q.question_id.split("-")[1]], q.answers[:1]), q
        assert not contains(q.question, q.answers), q
