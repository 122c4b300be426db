"""The web page in a real browser. Skipped where there is no Chromium."""

import re
import shutil
import time

import httpx
import pytest
from playwright import sync_api

from tests.serve_support import TEXTS, listening, make_service, publish

# No calls of the browser's own: a machine without a way out would wait for them.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(base, engine, tmp_path_factory):
    from cartridges.registry import Registry

    registry, scratch = Registry(tmp_path_factory.mktemp("registry")), tmp_path_factory.mktemp("scratch")
    publish(base, registry, "harbour", TEXTS["harbour"], scratch, kept=TEXTS["harbour"])
    publish(base, registry, "orchard", TEXTS["orchard"], scratch)
    with listening(make_service(base, registry, engine)) as url:
        yield url


@pytest.fixture
def page(browser, url):
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(url)
    yield page
    page.close()
    assert not problems


def ask(page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def answer(page, way: str):
    return page.locator(f"section[data-way={way}][data-state=done]")


def test_a_question_is_answered_in_all_three_ways_with_figures(page):
    ask(page, "Who is the harbour master?")
    for way in ("cartridge", "base", "full_context"):
        shown = answer(page, way)
        shown.wait_for(timeout=60_000)
        figures = shown.locator("dd").all_inner_texts()
        assert len(figures) == 4 and "–" not in figures, (way, figures)
    # An exact-KV cartridge of the same text says what the text itself does.
    texts = [answer(page, way).locator("p.text").inner_text() for way in ("cartridge", "full_context", "base")]
    assert texts[0] == texts[1] != texts[2]


def test_another_corpus_is_another_conversation(page):
    ask(page, "Who?")
    answer(page, "full_context").wait_for(timeout=60_000)
    page.get_by_label("Corpus").select_option("orchard")
    page.get_by_placeholder("Ask about orchard").wait_for()
    assert page.locator("article").count() == 0
    assert page.get_by_text("there is no full-context answer").is_visible()
    page.get_by_label("the base model beside it").uncheck()
    ask(page, "How many trees?")
    answer(page, "cartridge").wait_for(timeout=60_000)
    assert page.locator("section.way").count() == 1


def test_stop_ends_an_answer_and_the_next_question_is_answered(page, url):
    page.get_by_label("beside it").uncheck()
    ask(page, "Tell me everything that is known about the harbour.")
    page.locator("[data-state=asking] p.text").filter(has_text=re.compile(r"\S.{3}", re.DOTALL)).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("section[data-state=stopped]").wait_for(timeout=10_000)
    time.sleep(1)  # a client that went frees its slot within a second
    assert httpx.get(f"{url}/healthz").json()["in_flight"] == 0
    ask(page, "Who?")
    answer(page, "cartridge").wait_for(timeout=60_000)
