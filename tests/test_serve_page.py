"""The web page: served from the package, whole, offline, and wired to the API that there is."""

import asyncio
import re
from importlib.resources import files

import httpx
import pytest

from tests.serve_support import make_service
from workflows.serving.app import create_app
from workflows.serving.page import FOLDER

SCRIPTS = ("app.js", "api.js", "report.js")


@pytest.fixture(scope="module")
def app(base, engine, registry):
    return create_app(make_service(base, registry, engine))


def get(app, *paths: str) -> list[httpx.Response]:
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def imported(script: str) -> set[str]:
    return set(re.findall(r'from "([^"]+)"', script))


def test_the_page_and_all_that_it_names_are_there(app):
    (page,) = get(app, "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:href|src)="(web/[^"]+)"', page.text)
    libraries = dict(re.findall(r'"([\w/]+)": "\./(web/vendor/[^"]+)"', page.text))
    for response in get(app, *[f"/{path}" for path in [*named, *libraries.values()]]):
        assert response.status_code == 200, response.url
        assert response.headers["content-type"].partition(";")[0] in ("text/javascript", "text/css")
    for name in SCRIPTS:
        for source in imported((FOLDER / name).read_text()):
            assert source in libraries or (FOLDER / source).is_file(), (name, source)


def test_nothing_comes_from_elsewhere(app):
    (page,) = get(app, "/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for path in [FOLDER / "index.html", FOLDER / "style.css", *(FOLDER / name for name in SCRIPTS)]:
        assert not re.search(r"https?:|//cdn|@import|url\(", path.read_text()), path


def test_every_path_that_the_page_asks_for_is_a_route(app):
    asked = set(re.findall(r'["`](v1/[a-z/]+)', (FOLDER / "api.js").read_text()))
    assert asked == {"v1/cartridges", "v1/cartridges/", "v1/chat/completions"}
    routes = {route.path for route in app.routes}
    assert {f"/{path}" for path in asked if not path.endswith("/")} <= routes and "/v1/cartridges/{name}" in routes


def test_the_report_card_comes_with_the_cartridge(app):
    listed, one = get(app, "/v1/cartridges", "/v1/cartridges/harbour")
    assert "report_card" not in listed.json()["data"][0]
    told = one.json()
    assert told["report_card"] is None and told["full_context"] is False and told["composition"] == 0


def test_the_libraries_bring_their_licences():
    vendor = files("workflows") / "serving" / "web" / "vendor"
    assert "MIT" in (vendor / "LICENSE-preact").read_text() and "Apache" in (vendor / "LICENSE-htm").read_text()
