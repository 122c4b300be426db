"""The data card counts what is in the shards; the page shows it to a person, by itself."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridges.errors import UserError
from cartridges.records import Dropped
from cartridges.selfstudy import filters
from cartridges.selfstudy.data_card import Distribution, data_card
from cartridges.selfstudy.deduplicate import deduplicate
from tests.test_synthesize import conversation, write_part
from workflows.cli import main
from workflows.runtime.manifests import write_manifest
from workflows.synthesis.dataset_page import write_page
from workflows.synthesis.inspect_dataset import read_card

CHUNK = "The Light Service was founded in 1611 by Perrin Voss. <b>Ann</b> keeps it."


def test_distribution_is_that_of_the_values():
    values = np.random.default_rng(0).gamma(2.0, 0.7, 5000)
    told = Distribution(0, 16)
    for part in np.array_split(values, 7):
        told.add(part)
    counted = told.as_dict(bars=16)
    assert counted["n"] == 5000 and counted["mean"] == pytest.approx(values.mean())
    for share, value in counted["quantiles"].items():
        assert value == pytest.approx(np.quantile(values, float(share), method="inverted_cdf"), abs=16 / 4096)
    drawn = counted["histogram"]
    assert drawn["high"] == 8 and sum(drawn["counts"]) == 5000  # nothing lies above: the bars end there
    assert drawn["counts"] == np.histogram(values, 16, (0, 8))[0].tolist()
    assert Distribution(0, 1).as_dict()["mean"] is None


@pytest.mark.parametrize("answer, names", [
    ("It was Perrin Voss's idea.", []),
    ("It was Sylvia Roach, born in Marl.", ["Sylvia", "Roach", "Marl"]),
    ("Sylvia founded it. Nobody knows.", []),  # the first word of a sentence may have a capital for that alone
    ("- Founder: Perrin\n- Keeper of the Light: Ann", []),
    ("The founder was named by the Bench.", ["Bench"]),
])
def test_names_that_are_nowhere_in_the_chunk(answer, names):
    assert filters.ungrounded_names(answer, CHUNK, "Who founded it?") == names


def info(one, **values):
    one.info.update(values)
    return one


def two_rounds(number):
    """Token 1 is its first answer, token 3 its second."""
    one = conversation(number, "Where?")
    return replace(one, messages=2 * one.messages, loss_mask=np.array([True, False, True, False]))


@pytest.fixture
def dataset(tmp_path, tiny_model_dir):
    """Three kept conversations and four dropped ones; the first answer is token 2 with 0.4, then token 3."""
    first = conversation(1, "Who?", "<i>Ann</i>")
    first.topk_ids[:] = [[2, 1], [1, 0]]
    grounded = {"numbers": 2.0, "names": 1.0, "ungrounded_numbers": 0.0, "ungrounded_names": 0.0}
    write_part(tmp_path / "parts", "a.parquet", [
        info(first, known=1.0, teacher_nll=1.0, **grounded),
        info(conversation(2, "When?"), teacher_nll=3.0, **{**grounded, "ungrounded_numbers": 1.0}),
        info(two_rounds(3), known=1.0, teacher_nll=2.0, retries=1, **grounded),
        two_rounds(4),
        Dropped("c005", "recall", "empty", "chunk", ({"role": "user", "content": "A & B"},)),
        Dropped("c006", "recall", "error: KeyError: x", "chunk"),
        Dropped("c007", "recall", "error: ValueError: y", "chunk")])
    summary = deduplicate(tmp_path / "parts", tmp_path / "shards")
    manifest = {"fingerprint": "f" * 16, "planned": 7, "chunks": 2, "seed": 5, "settings": {},
                "corpus": {"id": "lights", "fingerprint": "a" * 32, "tokens": 1200}}
    model = {"name": str(tiny_model_dir), "revision": None, "weights_digest": "b" * 64}
    write_manifest(tmp_path / "data_card.json", data_card(summary, manifest, model))
    chunks = [{"chunk_id": "chunk", "text": CHUNK}, {"chunk_id": "other", "text": "none"}]
    pq.write_table(pa.Table.from_pylist(chunks), tmp_path / "chunks.parquet")
    return tmp_path


def test_card_counts_reasons_repeats_and_ungrounded_answers(dataset):
    card = read_card(dataset)
    assert card["conversations"] == {"kept": 3, "dropped": {"duplicate": 1, "empty": 1, "error": 2}}
    assert card["families"] == {"cloze": {"kept": 3, "duplicate": 1}, "recall": {"empty": 1, "error": 2}}
    assert card["duplicates"] == {"duplicate": 1, "near_duplicate": 0, "share": 0.25}
    assert card["chunks"] == {"planned": 2, "covered": 1, "most_conversations": 3, "fewest_conversations": 3}
    assert card["groundedness"]["written"]["numbers"] == {"count": 2, "ungrounded": 1, "share": 0.5}
    assert card["groundedness"]["known"]["numbers"] == {"count": 4, "ungrounded": 0, "share": 1}
    assert card["topk_mass"]["n"] == card["tokens"]["loss"] == 6
    assert card["topk_mass"]["quantiles"]["0.5"] == pytest.approx(0.8, abs=1e-3)
    assert card["teacher_nll"]["mean"] == 2 and card["answer_tokens"]["mean"] == 2
    assert [row["error"] for row in card["failures"]] == ["KeyError: x", "ValueError: y"]
    assert card["retried"] == 1


def test_the_command_prints_tables_or_json(dataset, capfd):
    assert main(["inspect", str(dataset), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == read_card(dataset)
    assert main(["inspect", str(dataset)]) == 0
    shown = capfd.readouterr().out
    assert "lights: 3 of 7 conversations kept" in shown and "failed c006 (recall): KeyError: x" in shown
    assert re.search(r"cloze +4 +3", shown) and "duplicates: 25.0%" in shown
    assert main(["inspect", str(dataset / "shards")]) == 2
    assert "data_card.json" in capfd.readouterr().err


def test_the_page_stands_alone_and_colours_by_the_teachers_probability(dataset):
    assert main(["inspect", str(dataset), "--html", str(dataset / "out" / "page.html")]) == 0
    page = (dataset / "out" / "page.html").read_text()
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:", page)
    assert page.count("<article") == 3 + 4  # every row is shown: there are fewer than the samples
    assert "A &amp; B" in page and "&lt;b&gt;Ann&lt;/b&gt;" in page and "<b>Ann</b>" not in page
    articles = [part for part in page.split("<article")[1:] if "<span title" in part]
    # Every answer of a kept one.
    assert [len(re.findall(r'class="text"><span', part)) for part in articles] == [1, 1, 2]
    (first, second), *_ = [re.findall(r'<span title="([^"]*)" style="[^"]*, ?([\d.]+)\)">([^<]*)</span>', part)
                           for part in articles]
    assert first[0].startswith("40.0%") and second[0].startswith("not among")
    assert float(first[1]) == pytest.approx(0.75 * -np.log10(0.4) / 3, abs=0.01) and second[1] == "0.75"


def test_samples_are_drawn_by_family_and_seed(dataset):
    def ids(seed):
        write_page(dataset, read_card(dataset), dataset / "page.html", samples=1, seed=seed)
        return re.findall(r"c00\d", (dataset / "page.html").read_text().split("<h2>Samples")[1])

    assert len(ids(0)) == 1 + 4 and ids(3) == ids(3)
    assert len({tuple(ids(seed)) for seed in range(6)}) > 1


def test_quantiles_are_not_held_at_the_ends_of_a_scale():
    told = Distribution(0, 8)
    told.add(np.full(100, 3.0))
    told.add(np.array([*[50.0] * 300, -1.0, np.inf]))
    assert told.edges[0] <= -1 and told.edges[-1] >= 50 and told.counts.sum() == 402
    assert told.quantile(0.1) == pytest.approx(3, abs=0.1) and told.quantile(0.95) == pytest.approx(50, abs=0.1)
    mass = Distribution(0, 1, bounded=True)
    mass.add(np.array([1.0000001] * 9))
    assert mass.edges[-1] == 1 and mass.quantile(0.5) > 0.99


def test_an_unfinished_data_set_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"data_card\.json"):
        read_card(tmp_path)
