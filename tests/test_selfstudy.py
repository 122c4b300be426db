"""Self-study: what is planned, asked, answered, dropped and stored."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from cartridges.config import SynthesizeSettings
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from cartridges.prompts import example_messages
from cartridges.records import Chunk, Conversation, Dropped
from cartridges.selfstudy import filters, questions
from cartridges.selfstudy.families import ENGLISH_RULES, FAMILIES, Proposal, draw_spans, register
from cartridges.selfstudy.languages import is_english
from cartridges.selfstudy.near_duplicates import jaccard, word_pairs
from cartridges.selfstudy.phrases import noun_phrases
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.spans import Statement, answer_spans, statements
from cartridges.selfstudy.storage import from_row, load_conversations, schema, to_row
from cartridges.selfstudy.synthesizer import Synthesizer
from cartridges.selfstudy.verbs import agent_verb

PROSE = ("The Light Service was founded in 1611 by Perrin Voss, a fisherman. The harbour of Marl has 84 berths. "
         "It was repaired later.")
TABLE = "The tolls.\n\n| Cargo | Toll |\n|---|---|\n| Wool | 14 dabs |\n| Rope | 9 dabs |\n"
CHUNKS = [Chunk("a" * 16, "d", 0, len(PROSE), PROSE), Chunk("b" * 16, "d", 200, 200 + len(TABLE), TABLE)]


def settings(**kw) -> SynthesizeSettings:
    return SynthesizeSettings(num_conversations=kw.pop("count", 40), max_answer_tokens=6, max_question_tokens=8,
                              topk=5, max_teacher_nll=100.0, **kw)


def test_plan_is_deterministic_and_proportional():
    tasks = plan(CHUNKS, settings(count=200), seed=1)
    assert tasks == plan(CHUNKS, settings(count=200), seed=1)
    assert tasks != plan(CHUNKS, settings(count=200), seed=2)
    assert len({task.conversation_id for task in tasks}) == 200


def test_a_chunk_s_share_goes_by_its_tokens_not_its_letters():
    texts = "harbour lighthouse breakwater ferryman. " * 5, "a b 1 2. " * 15
    chunks = [Chunk(str(i) * 16, "d", 0, len(text), text) for i, text in enumerate(texts)]
    owners = Counter(task.chunk_id for task in plan(chunks, settings(count=200), seed=1))
    assert owners["0" * 16] == pytest.approx(50, abs=1.5)


CHINESE = ("长江是亚洲最长的河流，全长6300公里。"
           "三峡大坝于1994年开工，2012年全部完工。黄河发源于巴颜喀拉山，全长5464公里。")
GERMAN = ("Der Rhein ist ein 1233 Kilometer langer Strom in Mitteleuropa. Er entspringt in den Schweizer Alpen und "
          "mündet in die Nordsee. Der Kölner Dom wurde 1880 von Ernst Zwirner vollendet.")
THAI = "หอคอยนี้สร้างขึ้นในปี 1871 และสูง 42 เมตร ตั้งอยู่ที่กรุงเทพ"
KOREAN = "이 탑은 1871년에 지어졌으며 높이는 사십이 미터이다. 등대지기는 두 명이고 바다를 지킨다."


def test_the_language_is_told_by_its_commonest_words():
    assert not any(map(is_english, (CHINESE, GERMAN, THAI, KOREAN, "Башня была построена в 1871 году.")))
    assert not is_english("La tour a été construite en 1871 par Anna Berg. Elle est haute et elle domine la ville.")
    assert not is_english("Wieża została zbudowana w 1871 roku przez Annę Berg i ma 42 metry, a jej lampa świeci się.")
    for english in (*(chunk.text for chunk in CHUNKS), "| port | name |\n|---|---|\n| 7 | echo |", "", "Anna Berg",
                    "def f(x):\n    return x + 1", "The mayor of Rio de Janeiro was in La Paz."):
        assert is_english(english)


@pytest.mark.parametrize("text", [CHINESE, GERMAN, THAI, KOREAN])
def test_other_languages_are_asked_what_no_rule_of_english_asks(text):
    chunk = Chunk("x", "d", 0, len(text), text)
    tasks = plan([chunk, *CHUNKS], SynthesizeSettings(num_conversations=400, general_share=0), 0)
    assert tasks == plan([chunk, *CHUNKS], SynthesizeSettings(num_conversations=400, general_share=0), 0)
    english = [task.seed_family in ENGLISH_RULES for task in tasks if task.chunk_id != "x"]
    assert 0.7 < sum(english) / len(english) < 0.99
    asked = set()
    for task in (task for task in tasks if task.chunk_id == "x"):
        assert task.seed_family not in ENGLISH_RULES
        proposal = FAMILIES[task.seed_family].propose(chunk, random.Random(task.seed), task.ordinal)
        if proposal and proposal.user:
            assert proposal.answer in text and not list(filters.question_faults(proposal.user, short=False))
            asked.add((proposal.user, proposal.answer))
    assert len(asked) >= 10
    given = plan([chunk], SynthesizeSettings(num_conversations=9, families={"anchored": 1}, general_share=0), 0)
    assert {task.seed_family for task in given} == {"anchored"}  # nothing else was wanted


def test_a_text_without_spaces_gets_its_share():
    """Of the tokens of the two; a run of characters is not one piece."""
    texts = {"zh": CHINESE * 4, "en": "The lighthouse was built in 1871 by Anna Berg. It has 42 steps. " * 12}
    chunks = [Chunk(name, "d", 0, len(text), text) for name, text in texts.items()]
    tasks = plan(chunks, SynthesizeSettings(num_conversations=1000, general_share=0), 0)
    share = sum(task.chunk_id == "zh" for task in tasks) / len(tasks)
    assert 0.5 < share < 0.65  # 228 characters against 180 words and stops


def test_answers_are_found_where_there_are_no_spaces():
    assert filters.says("全长6300公里", "6300") and filters.says("全长6300公里", "公里")
    assert not filters.says("全长16300公里", "6300") and not filters.says("In x1871.", "1871")
    assert not list(filters.question_faults("长江有多长？", short=True))
    assert list(filters.question_faults("为？", short=True)) == ["empty"]
    assert jaccard(word_pairs("长江全长6300公里"), word_pairs("长江全长6301公里")) > 0.4


def test_unknown_family_is_named():
    with pytest.raises(UserError, match="'poetry' does not exist"):
        plan(CHUNKS, settings(families={"poetry": 1}), seed=0)


def test_statements_tell_rows_with_their_columns():
    told = statements(TABLE)
    assert [s.cells for s in told if s.cells] == [(("Cargo", "Wool"), ("Toll", "14 dabs")),
                                                  (("Cargo", "Rope"), ("Toll", "9 dabs"))]
    assert not any(s.cells for s in statements("| Rope | 9 dabs |\n| Salt | 11 dabs |\n"))


def test_answer_spans_are_numbers_names_and_phrases():
    spans = answer_spans(statements(PROSE)[0])
    assert spans[0] == "1611" and "Perrin Voss" in spans and "fisherman" in spans
    assert "84 berths" in answer_spans(statements(PROSE)[1])
    told = "It rose from US$3 per barrel to $2.2 billion, by 12 per cent in 3 places."
    priced = answer_spans(Statement(told, told))
    assert {"US$3", "$2.2 billion", "12 per cent", "3 places", "3"} <= set(priced)
    assert not {"3 per", "2.2", "12 per"} & set(priced)
    told = "The merger of 2008 was for $60,000 pay and 1500 people."
    counted = set(answer_spans(Statement(told, told)))
    assert {"2008", "$60,000", "1500 people", "1500"} <= counted and not {"2008 was", "$60,000 pay"} & counted


@pytest.mark.parametrize("sentence, span, expected", [
    ("The port number of ftp is 21.", "21", {"What is the port number of ftp?"}),
    ("The harbour of Marl has 84 berths.", "84", {"How many berths does the harbour of Marl have?"}),
    ("Perrin Voss founded the Light Service.", "Perrin Voss",
     {"Who founded the Light Service?", "What founded the Light Service?"}),
    ("The Light Service was founded in 1611.", "1611",
     {f"{when} was the Light Service founded?" for when in ("When", "In which year", "In what year")}),
    ("The Golden Fiddle sank in 1774, when she struck a reef.", "1774",
     {f"{when} did the Golden Fiddle sink?" for when in ("When", "In which year", "In what year")}),
    ("The chart now hangs in the Tallow Hall.", "Tallow Hall", {"Where does the chart now hang?"}),
    ("In 1872, the Central Line opened a station near Marl.", "1872",
     {f"{when} did the Central Line open a station near Marl?"
      for when in ("When", "In which year", "In what year")}),
    ("Lost things are kept for 50 days.", "50", {"How many days are lost things kept for?"}),
    ("The Lucky Button is a lugger built in 1916.", "1916",
     {f"{when} was the Lucky Button built?" for when in ("When", "In which year", "In what year")}),
    ("The Barrel Race is held on 22 July.", "22 July", {"When is the Barrel Race held?"}),
    ("It was founded in 1611.", "1611", {None}),
    ("Bread for the lonely keeper near Marl is hauled up in a bucket.", "lonely keeper", {None}),
    ("The pie of Marl is made of eels and leeks.", "leeks", {"The pie of Marl is made of eels and what?"}),
    ("There were 12 of 120 left.", "20", {None}),
    ("The bishop was buried in the old chapel.", "in the old chapel", {"Where was the bishop buried?"}),
    ("The mill opened in spring.", "in spring", {"When did the mill open?"}),
    ("Later the keepers moved the bell.", "bell", {"What did the keepers move?"}),
    ("The mayor asked the council to pay $2.2 million.", "$2.2 million",
     {"How much did the mayor ask the council to pay?"}),
    ("The price rose from $3 per barrel.", "$3", {"What did the price rise from?"}),
    ("The bridge had shrunk by 12 per cent.", "12", {"What had the bridge shrunk by?"}),
    ("The school became one after its 1977 merger.", "1977",
     {"Which year's merger did the school become one after?"}),
    ("The hall seats 1500 people.", "1500", {"How many people does the hall seat?"}),
    ("The club won Serie A in 1990.", "1990", {f"{when} did the club win Serie A?"
                                               for when in ("When", "In which year", "In what year")}),
    ("Italy, Austria and Norland formed a league in 1850.", "1850",
     {"Italy, Austria and Norland formed a league in which year?"}),
    ("The castle walls around the town were built in 1300.", "1300",
     {f"{when} were the castle walls around the town built?" for when in ("When", "In which year", "In what year")}),
    ("The book that he wrote was printed in 1999.", "1999",
     {f"{when} was the book that he wrote printed?" for when in ("When", "In which year", "In what year")}),
    ("3 million people live there.", "3 million", {"How many people live there?"}),
    ("30% of the people left.", "30%", {"What share of the people left?"}),
    ("$3 million was raised.", "$3 million", {"How much was raised?"}),
    ("In 1785 the mill sold a boat.", "boat", {"What did the mill sell in 1785?", "What did the mill sell?"}),
    ("The keeper saw the tower of Marl.", "tower", {"What did the keeper see?"}),
    ("The mill is known for the eels of the year.", "eels", {"What is the mill known for?"}),
    ("The town has 40 people per square mile.", "40 people", {"How many people does the town have per square mile?",
                                                             "How many people does the town have?"}),
    ("12 keepers left.", "12 keepers", {"How many keepers left?"}),
    ("Marl's clock was repaired.", "Marl", {"Whose clock was repaired?"}),
    ("Because corn was sold in dabs, the mills closed.", "dabs", {"Because corn was sold in what?"}),
    ("The harbour sold boats (luggers and brigs) to Norland.", "Norland",
     {f"The harbour sold boats (luggers and brigs) to {word}?" for word in ("who", "what")}),
])
def test_questions_by_rule(sentence, span, expected):
    asked = {questions.ask(Statement(sentence, sentence), span, random.Random(seed)) for seed in range(20)}
    assert asked <= expected and asked


def test_noun_phrases_come_bare_with_article_and_preposition_and_with_what_hangs_on_them():
    found = noun_phrases("Older rocks, such as the gneiss of the Slave craton in northwestern Canada, were found.")
    assert {"gneiss", "the gneiss", "Slave craton", "the Slave craton", "the Slave craton in northwestern Canada",
            "the gneiss of the Slave craton in northwestern Canada"} <= set(found)
    assert {"in the shallow crust", "well logs"} <= set(noun_phrases("Faults in the shallow crust and well logs"))
    assert "water, coal, and salt extraction" in noun_phrases("They look for water, coal, and salt extraction.")
    assert {"Structural geologists", "microscopic analysis"} <= set(
        noun_phrases("Structural geologists use microscopic analysis."))
    assert not {"The clerk keeps", "clerk keeps", "keeps"} & set(noun_phrases("The clerk keeps the tide book."))
    assert noun_phrases("Le vieux phare fut construit par les pauvres habitants") == []  # no sign of where one ends


@pytest.mark.parametrize("sentence, span, expected", [
    ("It was founded in 1611.", "1611", "It was founded in which year?"),
    ("These rocks form the shallow crust, they say.", "the shallow crust", "These rocks form what?"),
    ("These rocks form the shallow crust, they say.", "shallow crust", "These rocks form what?"),
    ("Because of this, the keeper of the light sleeps.", "light", "The keeper of what sleeps?"),
    ("They sleep.", "They sleep", None),
    ("A boat (or a barge that the keepers towed) sank.", "barge", "What that the keepers towed sank?"),
    ("They sold the old and the new light to the town of Marl.", "old", "They sold what?"),
    ("And the keepers' boats left the harbour in Norland again.", "Norland",
     "The keepers' boats left the harbour in what again?"),
    ("They went to the keepers' house.", "keepers", "They went to whose house?"),
    ("Das Licht brennt im Turm am Hafen.", "Turm", None),
])
def test_where_no_rule_fits_the_clause_is_asked_with_a_gap(sentence, span, expected):
    assert questions.gap(Statement(sentence, sentence), span, random.Random(0)) == expected


def test_every_span_of_prose_can_be_a_short_answer():
    proposals = [FAMILIES["anchored"].propose(CHUNKS[0], random.Random(i), i) for i in range(60)]
    spans = {span for statement in statements(CHUNKS[0].text) for span in answer_spans(statement)}
    assert None not in proposals
    assert len({one.answer for one in proposals}) > 0.8 * len(spans)


FERRIES = Statement("", "", (("Ferry", "Teal"), ("Captain", "Ruth Hale"), ("Leaves at", "16:30"), ("Built", "1871"),
                             ("Beds", "12"), ("Length", "120 feet"), ("Owner", "Ann Oak"), ("Fare", "9 dabs")))


@pytest.mark.parametrize("span, some, sentence", [
    ("Ruth Hale", "Who is the captain of Teal?", "The captain of Teal is Ruth Hale."),
    ("16:30", "When does Teal leave?", "Teal leaves at 16:30."),
    ("1871", "In which year was Teal built?", "Teal was built in 1871."),
    ("12", "How many beds does Teal have?", "Teal has 12 beds."),
    ("Teal", "Which ferry leaves at 16:30?", "Teal leaves at 16:30."),
    ("16:30", "At what time does Teal leave?", "Teal leaves at 16:30."),
    ("120 feet", "How long is Teal?", "The length of Teal is 120 feet."),
    ("120 feet", "How many feet is the length of Teal?", "The length of Teal is 120 feet."),
    ("Ann Oak", "Who owns Teal?", "The owner of Teal is Ann Oak."),
    ("9 dabs", "How much is Teal?", "The fare of Teal is 9 dabs."),
])
def test_questions_about_rows_follow_the_column(span, some, sentence):
    assert some in {questions.ask(FERRIES, span, random.Random(seed)) for seed in range(60)}
    assert questions.sentence(FERRIES, span, some) == sentence


def test_a_cell_that_holds_a_common_one_is_asked_for():
    rows = [f"| Pier {i} | {1 if i < 6 else 9} | No {i} |" for i in range(8)] + ["| Line 1 | 3 | No |"]
    text = "\n".join(["| Berth | Fee | Line |", "|---|---|---|", *rows])
    chunk = Chunk("c" * 16, "d", 0, len(text), text)
    spans = {next(draw_spans(chunk, random.Random(i), i, attempts=1))[1] for i in range(200)}
    assert {"Pier 1", "Line 1", "No 7", "9"} <= spans and "1" not in spans


def test_a_family_repeats_itself_only_when_its_chunk_is_exhausted():
    pairs = sum(len(answer_spans(statement)) for statement in statements(PROSE))
    told = len(statements(PROSE))
    shortest = min(len(answer_spans(statement)) for statement in statements(PROSE))
    first = [next(draw_spans(CHUNKS[0], random.Random(i), i, attempts=1)) for i in range(told * shortest)]
    assert len(set(first)) == len(first), "a pair came again while every statement still had others"
    rounds = [next(draw_spans(CHUNKS[0], random.Random(i), i, attempts=1)) for i in range(10 * pairs)]
    assert len(set(rounds)) == pairs, "every pair has its turn"


@pytest.mark.parametrize("row", ["| Teal |", "| | Ann |", "| Teal | |"])
def test_a_row_that_says_nothing_of_its_subject_is_passed_over(row):
    columns = row.count("|") - 1
    header = "| Name | Keeper |" if columns == 2 else "| Name |"
    text = "\n".join([header, "|" + "---|" * columns, row])
    chunk = Chunk("c" * 16, "d", 0, len(text), text)
    for family in ("anchored_sentence", "keywords"):
        assert [FAMILIES[family].propose(chunk, random.Random(i), i) for i in range(6)] == [None] * 6


def test_what_every_statement_says_is_not_asked_for():
    text = "\n".join(f"The port number of {name} is {i}." for i, name in enumerate(["echo", "time", "talk", "smtp"], 7))
    chunk = Chunk("c" * 16, "d", 0, len(text), text)
    spans = {next(draw_spans(chunk, random.Random(i), i, attempts=1))[1] for i in range(40)}
    assert {"7", "8", "9", "10"} <= spans and not any("number" in span for span in spans)
    shown = {FAMILIES["recall"].propose(chunk, random.Random(i), i).user for i in range(40)}
    assert shown == {f"Continue: The port number of {name}" for name in ("echo", "time", "talk", "smtp")}


@pytest.mark.parametrize("noun, verb", [
    ("keeper", "keeps"), ("owner", "owns"), ("driver", "drives"), ("runner", "runs"), ("editor", "edits"),
    ("captain", None), ("officer", None), ("master", None)])
def test_an_agent_s_verb(noun, verb):
    assert agent_verb(noun) == verb


def test_the_cell_that_answers_is_the_one_in_the_question():
    row = Statement("", "", (("Boat", "Teal"), ("Keeper", ""), ("Pilots", "2"), ("Length", "120 feet")))
    assert questions.sentence(row, "Teal", "Which boat has the length 120 feet?") == "The length of Teal is 120 feet."
    assert questions.sentence(row, "Teal", "Which boat?") == "Teal has 2 pilots."


TOLD = ("The port number of echo is 7. The port number of discard is 9.\nThe port number of qotd is 17.\n"
        "The number of beds of the Otter is 12. The number of beds of the Wet Parson is 9. "
        "The number of beds of Marl is 4. "
        "The University of Chicago is large. The University of Marl is small. The University of Ely is old.")


def test_abbreviations_are_no_ends_of_sentences_or_names():
    text = "The embargo threatened the U.S. economy, wrote J. Smith of the U.S. Navy. Plan B was made by Ann Lee."
    first, second = statements(text)
    assert first.text.endswith("Navy.") and {"U.S.", "U.S. Navy", "Smith"} <= set(answer_spans(first))
    assert not any(span.endswith((" U", " J")) or span in "UJ" for span in answer_spans(first))
    assert "Plan B" in answer_spans(second)
    asked = {questions.gap(first, span, random.Random(0)) for span in answer_spans(first)}
    assert not any(re.search(r"wh\w+ \.", question) for question in asked if question)


def test_a_table_that_is_told_in_sentences_is_asked_about_by_column():
    cells = [statement.cells for statement in statements(TOLD)]
    assert cells[:4] == [(("", "echo"), ("port number", "7")), (("", "discard"), ("port number", "9")),
                         (("", "qotd"), ("port number", "17")), (("", "the Otter"), ("number of beds", "12"))]
    assert cells[-3:] == [()] * 3  # a name that is told about three times is no column
    assert not any(statement.cells for statement in statements(TOLD[:TOLD.index("\n")]))  # twice is no table
    forms = "The code for Mali is ML. Peru's code is PE. Laos' code is LA. The code of the Holy See is VA, they say."
    assert [statement.cells for statement in statements(forms)] == [
        (("", country), ("code", code)) for country, code in (("Mali", "ML"), ("Peru", "PE"), ("Laos", "LA"))] + [
        (("", "the Holy See"), ("code", "VA"))]
    chunk = Chunk("t" * 16, "d", 0, len(TOLD), TOLD.splitlines()[0] + " " + TOLD.splitlines()[1])
    asked = {family: [FAMILIES[family].propose(chunk, random.Random(n), n) for n in range(60)]
             for family in ("anchored", "anchored_sentence", "keywords")}
    by_answer = Counter(one.answer for one in asked["anchored"])
    # The cells are asked for, as a rule; never the column, nor a half of the sentence.
    assert set(by_answer) == {"7", "9", "17", "echo", "discard", "qotd"}
    assert sum(by_answer[value] for value in ("7", "9", "17")) > 30
    questions = {one.user for one in asked["anchored"]}
    assert {"What is the port number of qotd?", "Which port number belongs to qotd?"} <= questions
    assert any(one.user in ("What has the port number 7?", "Whose port number is 7?") and one.answer == "echo"
               for one in asked["anchored"])
    assert {one.answer for one in asked["anchored_sentence"]} == {
        f"The port number of {name} is {port}." for name, port in (("echo", 7), ("discard", 9), ("qotd", 17))}
    assert all("port number" in one.user for one in asked["keywords"])  # other columns may be about the same


def test_a_place_is_no_person():
    row = Statement("", "", (("Country", "Norland"), ("Capital", "Upper Loom"), ("King", "Olaf Grey")))
    capital, king = ({questions.ask(row, cell, random.Random(n)) for n in range(200)}
                     for cell in ("Upper Loom", "Olaf Grey"))
    assert not any(question.startswith("Who") for question in capital) and "Who is the king of Norland?" in king


def test_keywords_lead_to_the_statement_that_holds_them():
    proposals = [FAMILIES["keywords"].propose(CHUNKS[0], random.Random(i), i) for i in range(12)]
    assert len({proposal.user for proposal in proposals}) > 6
    for proposal in proposals:
        words = proposal.user.strip("?.").partition(" about ")[2] or proposal.user.strip("?.").partition(" of ")[2]
        assert all(word in proposal.answer for word in words.split(", ")), proposal


def test_filters():
    assert list(filters.question_faults("", short=True)) == ["empty", "malformed"]
    assert list(filters.question_faults("Tell me about Marl", short=True)) == ["malformed"]
    assert list(filters.question_faults("What does the text say of Marl?", short=True)) == ["refers_to_text"]
    assert filters.gives_answer_away("Who is Perrin Voss?", "Perrin Voss")
    assert not filters.gives_answer_away("What is 140?", "40")
    assert filters.ungrounded_numbers("It has 84 berths and 3 cranes.", PROSE, "How many?") == ["3"]


class Pointing:
    """An earlier question is about a text that the reader has not."""

    decodes = False

    def propose(self, chunk, rng, ordinal):
        return Proposal(user="Who founded the Light Service?", answer="Perrin Voss", short=True,
                        earlier=(("Who is named in this passage?", "Perrin Voss"),))


class Silent:
    """A family that never finds anything to ask."""

    decodes = False

    def propose(self, chunk, rng, ordinal):
        return None


class Fixed:
    """A family whose answer is known; the teacher scores it."""

    decodes = False

    def propose(self, chunk, rng, ordinal):
        return Proposal(user="Who founded the Light Service?", answer="Perrin Voss", short=True)


@pytest.fixture(scope="module")
def made(tiny_base_model):
    register("silent", Silent())
    register("fixed", Fixed())
    wanted = settings(count=28, families={"fixed": 1, "silent": 1, "cloze": 1, "question": 1, "anchored": 1,
                                          "anchored_rounds": 1})
    synthesizer = Synthesizer(TransformersEngine(tiny_base_model, max_rows=8), tiny_base_model.template,
                              {chunk.chunk_id: chunk for chunk in CHUNKS}, wanted)
    tasks = plan(CHUNKS, wanted, seed=0)
    yield synthesizer, tasks, synthesizer.run(tasks)
    del FAMILIES["silent"], FAMILIES["fixed"]


def test_one_result_a_task_in_order(made):
    _, tasks, results = made
    assert [r.conversation_id for r in results] == [t.conversation_id for t in tasks]
    assert {r.reason for r in results if r.seed_family == "silent"} == {"nothing_to_ask"}
    assert all(isinstance(r, Conversation) for r in results if r.seed_family == "fixed")


def test_rows_are_the_teachers_with_the_chunk(made, tiny_base_model):
    import torch

    _, _, results = made
    chunks = {chunk.chunk_id: chunk for chunk in CHUNKS}
    kept = [r for r in results if isinstance(r, Conversation)]
    single, several = ([r for r in kept if r.seed_family == family][:3] for family in ("fixed", "anchored_rounds"))
    assert single and several
    for one in (*single, *several):
        before = tiny_base_model.template.system_ids(chunks[one.chunk_id].text)
        with torch.no_grad():
            logits = tiny_base_model.model(torch.tensor([[*before, *one.input_ids.tolist()]])).logits[0]
        at = len(before) + np.flatnonzero(one.loss_mask)
        expected = logits[at].log_softmax(-1).topk(5).values
        torch.testing.assert_close(torch.from_numpy(one.topk_logprobs), expected, atol=1e-3, rtol=1e-3)


def test_conversations_are_their_template_and_share_the_examples(made, tiny_base_model):
    template = tiny_base_model.template
    shared = template.conversation_ids(example_messages(), generation_prompt=False)
    for one in made[2]:
        if isinstance(one, Conversation):
            prompt = template.conversation_ids(one.messages[:-1])
            assert one.input_ids[: len(prompt)].tolist() == prompt
            assert one.input_ids[-1] == template.tokenizer.eos_token_id
            assert one.input_ids[: one.shared_tokens].tolist() == shared[: one.shared_tokens]
            assert answers_taught(one, template) == [
                message["content"] for message in one.messages[6 if one.shared_tokens else 0:]
                if message["role"] == "assistant"]


def answers_taught(one: Conversation, template) -> list[str]:
    """What the loss is on, turn by turn."""
    ids = one.input_ids[1:][one.loss_mask[:-1]]
    ends = np.flatnonzero(ids == template.tokenizer.eos_token_id)
    return [template.tokenizer.decode(turn, skip_special_tokens=True) for turn in np.split(ids, ends + 1) if len(turn)]


def test_rounds_by_rule_ask_different_things():
    rounds = [FAMILIES["anchored_rounds"].propose(CHUNKS[0], random.Random(i), i) for i in range(8)]
    assert all(rounds)
    for one in rounds:
        told = [*one.earlier, (one.user, one.answer)]
        assert len(told) > 1 and len(dict(told)) == len({answer for _, answer in told}) == len(told)
        assert all(answer in PROSE for _, answer in told)


def test_every_question_of_several_rounds_is_filtered(tiny_base_model):
    register("pointing", Pointing())
    try:
        for off in ((), ("refers_to_text",)):
            wanted = settings(count=2, families={"pointing": 1}, filters_off=off)
            results = Synthesizer(TransformersEngine(tiny_base_model), tiny_base_model.template,
                                  {chunk.chunk_id: chunk for chunk in CHUNKS}, wanted).run(plan(CHUNKS, wanted, seed=0))
            if off:
                assert all(isinstance(one, Conversation) for one in results)
            else:
                assert {one.reason for one in results} == {"refers_to_text"}
    finally:
        del FAMILIES["pointing"]


def test_the_asking_side_asks_on(tiny_base_model):
    wanted = settings(count=6, families={"multi_round": 1}, asking_temperature=1.0, filters_off=(
        "empty", "malformed", "refers_to_text", "truncated", "ungrounded"))
    asker = Listening()
    synthesizer = Synthesizer(TransformersEngine(tiny_base_model, max_rows=8), tiny_base_model.template,
                              {chunk.chunk_id: chunk for chunk in CHUNKS}, wanted, asker)
    made = synthesizer.run(plan(CHUNKS, wanted, seed=0))
    assert len(asker.asked) == 2 * len(made) and {len(one.messages) for one in made} == {4}
    for one in made:
        first, answer, second, last = (message["content"] for message in one.messages)
        assert (first, second) == ("Who is it?", "And where?")
        # What was answered is shown to whoever asks on, and both answers are taught.
        assert any(f"Question: {first}\nAnswer: {answer}" in ask.seed_prompt for ask in asker.asked)
        assert answers_taught(one, tiny_base_model.template) == [answer, last]
        assert one.topk_ids.shape == (one.loss_mask.sum(), 5)


class Listening:
    """An asking side that says the same to all, and remembers what it was shown."""

    def __init__(self):
        self.asked = []

    def ask(self, asks):
        self.asked += asks
        return ["And where?" if "Answer: " in ask.seed_prompt else "Who is it?" for ask in asks]


def test_same_tasks_same_conversations_however_batched(made):
    synthesizer, tasks, results = made
    halves = [*synthesizer.run(tasks[:7]), *synthesizer.run(tasks[7:])]
    assert [r.conversation_id for r in halves] == [r.conversation_id for r in results]
    for a, b in zip(halves, results, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Conversation):
            assert a.messages == b.messages


def test_parquet_reads_back_and_says_what_it_promises(made, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [to_row(result) for result in made[2]]
    pq.write_table(pa.Table.from_pylist(rows, schema()), tmp_path / "part.parquet")
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "part.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))
    for row, result in zip(read, made[2], strict=True):
        back = from_row(row)
        if isinstance(result, Dropped):
            assert back == result
            continue
        assert np.array_equal(back.topk_logprobs, result.topk_logprobs)
        assert back.messages == result.messages and back.shared_tokens == result.shared_tokens
        for i, ids in enumerate(row["topk_ids"]):
            assert len(ids) == (5 if row["loss_mask"][i] else 0)
    kept = [r.conversation_id for r in made[2] if isinstance(r, Conversation)]
    assert [c.conversation_id for c in load_conversations(tmp_path)] == sorted(kept)


def test_no_conversations_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no conversations"):
        load_conversations(tmp_path)
