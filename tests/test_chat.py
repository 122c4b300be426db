"""`cartridges chat`: the local cartridge and the served one say the same; --json prints one object."""

import io
import json

import pytest

from cartridges.engines.stream import TransformersStreamingEngine
from cartridges.errors import UserError
from tests.serve_support import listening, make_service
from workflows.cli import main
from workflows.cli.commands import chat as chat_module
from workflows.cli.commands.chat import chat

QUESTION = "Who is the harbour master?"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_TOKENS", 12)
    monkeypatch.setattr(chat_module, "DEFAULT_URL", "http://127.0.0.1:9")  # nothing listens there


def test_local_and_served_answers_are_the_same(base, registry, tiny_model_dir):
    printed = io.StringIO()
    local = chat("harbour", QUESTION, str(registry.root), model=str(tiny_model_dir), out=printed)
    assert printed.getvalue() == local["answer"] + "\n"
    engine = TransformersStreamingEngine(base)
    with listening(make_service(base, registry, engine)) as url:
        served = chat("harbour", QUESTION, "nowhere", url=url, out=io.StringIO())
        with pytest.raises(UserError, match="nobody"):
            chat("nobody", QUESTION, "nowhere", url=url, out=io.StringIO())
    engine.close()
    assert served == local


def test_json_is_alone_on_stdout(base, registry, capsys):
    engine = TransformersStreamingEngine(base)
    with listening(make_service(base, registry, engine)) as url:
        assert main(["chat", "harbour", QUESTION, "--url", url, "--json"]) == 0
    engine.close()
    out, err = capsys.readouterr()
    assert json.loads(out)["answer"] in err


def test_a_dialogue_reads_until_an_empty_line(registry, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nAnd the toll?\n\nnot asked\n"))
    printed = io.StringIO()
    assert chat("harbour", None, str(registry.root), model=str(tiny_model_dir), out=printed) is None
    assert printed.getvalue().count("\n") >= 2


def test_no_service_is_one_clear_line(registry):
    with pytest.raises(UserError, match="start one with `cartridges serve`"):
        chat("harbour", QUESTION, str(registry.root), url="http://127.0.0.1:9")
