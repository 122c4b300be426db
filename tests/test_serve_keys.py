"""API keys: hashed at rest, each with its corpora and rate; no network without them; the audit log."""

import asyncio
import json
import stat
from pathlib import Path

import httpx
import pytest
import yaml

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from tests.serve_support import make_service, value_of
from workflows.cli import main
from workflows.serving import access
from workflows.serving.access import Authenticator, is_loopback
from workflows.serving.app import create_app
from workflows.serving.errors import ApiError
from workflows.serving.keys import add_key, read_keys, revoke_key
from workflows.serving.serve import running_service

ASK = {"messages": [{"role": "user", "content": "A secret question?"}], "max_tokens": 3}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "keys.yaml"


def calling(service, *calls, peer: str = "127.0.0.1"):
    """The responses to `(method, path, key, body)` sent one after the other."""
    async def run():
        transport = httpx.ASGITransport(create_app(service), client=(peer, 1), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path, json=body,
                                         headers={"Authorization": f"Bearer {key}"} if key else {})
                    for method, path, key, body in calls]

    return asyncio.run(run())


def test_only_a_hash_is_at_rest(file):
    record, key = add_key(file, "acme", ("services/*", "sample"), 60, False)
    text = file.read_text()
    assert key.startswith("ck_") and len(key) > 40 and key not in text and key[3:] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == (record,) and record.corpora == ("services/*", "sample")
    _, other = add_key(file, "acme", ("*",), 0, True)
    assert other != key and len(read_keys(file)) == 2
    revoke_key(file, record.id)
    assert [kept.manage for kept in read_keys(file)] == [True]


def test_the_command_line_shows_a_key_once(file, capsys):
    assert main(["keys", "add", "acme", "--corpora", "a,b*", "--rate", "5", "--file", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["corpora"] == ["a", "b*"] and made["key"].startswith("ck_")
    assert main(["keys", "list", "--file", str(file)]) == 0
    told = capsys.readouterr().out
    assert made["id"] in told and made["key"] not in told and "sha256" not in told
    assert main(["keys", "revoke", "nope", "--file", str(file)]) == 2
    assert main(["keys", "revoke", made["id"], "--file", str(file)]) == 0 and read_keys(file) == ()
    assert main(["keys", "list", "--file", str(file.with_name("none.yaml"))]) == 2
    assert "there is no keys file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1, 2", "keys: 3", "keys: [{id: a}]", "other: 1"])
def test_a_malformed_file_is_one_line(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match="keys file") as error:
        Authenticator(str(file))
    assert "\n" not in str(error.value)


def test_a_key_opens_its_own_corpora_and_nothing_else(base, engine, registry, file):
    _, key = add_key(file, "acme", ("harb*",), 0, False)
    service = make_service(base, registry, engine, keys_file=str(file))
    chat = "/v1/chat/completions"
    none, wrong, right, free, other, both, listed, found, hidden, metrics, load, health, schema = calling(
        service,
        ("POST", chat, None, ASK | {"model": "harbour"}),
        ("POST", chat, key + "x", ASK | {"model": "harbour"}),
        ("POST", chat, key, ASK | {"model": "harbour"}),
        ("POST", chat, key, ASK | {"model": "base"}),
        ("POST", chat, key, ASK | {"model": "orchard"}),
        ("POST", chat, key, ASK | {"model": "harbour+orchard"}),
        ("GET", "/v1/models", key, None),
        ("GET", "/v1/cartridges/harbour", key, None),
        ("GET", "/v1/cartridges/orchard", key, None),
        ("GET", "/metrics", key, None),
        ("POST", "/v1/cartridges", key, {"name": "harbour"}),
        ("GET", "/healthz", None, None),
        ("GET", "/openapi.json", None, None))
    for refused in (none, wrong, schema):
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert right.status_code == free.status_code == found.status_code == health.status_code == 200
    for unseen in (other, both, hidden):
        # As if it were not there: neither the status nor a suggestion gives it away.
        assert unseen.status_code == 404 and "near it" in unseen.text
        assert "orchard" not in unseen.json()["error"]["message"].partition("near it")[2]
    assert [model["id"] for model in listed.json()["data"]] == [base.identity.name, "harbour"]
    assert metrics.status_code == load.status_code == 403


def test_a_manager_may_load(base, engine, registry, file):
    _, key = add_key(file, "ops", ("*",), 0, True)
    service = make_service(base, registry, engine, keys_file=str(file))
    loaded, metrics = calling(service, ("POST", "/v1/cartridges", key, {"name": "orchard"}),
                              ("GET", "/metrics", key, None))
    assert loaded.status_code == 201 and metrics.status_code == 200


def test_the_rate_is_limited_a_key(file, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    (_, slow), (_, free) = add_key(file, "acme", ("*",), 2, False), add_key(file, "acme", ("*",), 0, False)
    gate = Authenticator(str(file))
    admitted = [gate.admit("10.0.0.9", f"Bearer {slow}").tenant for _ in range(2)]
    assert admitted == ["acme", "acme"]
    with pytest.raises(ApiError, match="2 requests a minute") as refused:
        gate.admit("10.0.0.9", f"Bearer {slow}")
    assert refused.value.status == 429 and refused.value.retry_after == 30
    assert all(gate.admit("10.0.0.9", f"Bearer {free}") for _ in range(20))
    now[0] += 30
    assert gate.admit("10.0.0.9", f"Bearer {slow}")


def test_a_revoked_key_stops_and_a_broken_file_locks_nobody_out(file, monkeypatch):
    monkeypatch.setattr(access, "FRESH_S", 0.0)
    (first, one), (_, two) = add_key(file, "a", ("*",), 0, False), add_key(file, "b", ("*",), 0, False)
    gate = Authenticator(str(file))
    assert gate.admit("", f"Bearer {one}").tenant == "a" and gate.admit("", f"bearer {two}").tenant == "b"
    revoke_key(file, first.id)
    with pytest.raises(ApiError):
        gate.admit("", f"Bearer {one}")
    whole = file.read_text()
    file.write_text("keys: [")
    assert gate.admit("", f"Bearer {two}").tenant == "b"
    file.write_text(yaml.safe_dump({"keys": yaml.safe_load(whole)["keys"]}))
    assert gate.admit("", f"Bearer {two}").tenant == "b"
    file.unlink()
    with pytest.raises(ApiError):
        gate.admit("", f"Bearer {two}")


def test_without_keys_only_this_machine_is_answered(base, engine, registry):
    service = make_service(base, registry, engine)
    asked = ("GET", "/v1/models", None, None)
    assert [calling(service, asked, peer=peer)[0].status_code for peer in ("127.0.0.1", "::1", "10.1.2.3")] \
        == [200, 200, 403]
    gate = Authenticator(None)
    assert all(gate.admit("127.0.0.1", None, host) for host in ("127.0.0.1:8000", "localhost", "[::1]:80", "[::1]"))
    for host in ("rebound.example:8000", "rebound.example", "10.1.2.3:8000", ""):
        with pytest.raises(ApiError, match="only on its own machine"):
            gate.admit("127.0.0.1", None, host)
    opened = make_service(base, registry, engine, open_to_network=True)
    assert calling(opened, asked, peer="10.1.2.3")[0].status_code == 200
    assert [is_loopback(host) for host in ("localhost", "127.3.2.1", "0.0.0.0", "::", "example.org", "")] \
        == [True, True, False, False, False, False]


def test_a_network_address_without_keys_is_refused_at_start(tmp_path):
    settings = BuildSettings.model_validate({"serve": {"host": "0.0.0.0"}})
    with pytest.raises(UserError, match="without API keys"), running_service(str(tmp_path), settings):
        pass
    missing = BuildSettings.model_validate({"serve": {"keys_file": str(tmp_path / "none.yaml")}})
    with pytest.raises(UserError, match="there is no keys file"), running_service(str(tmp_path), missing):
        pass


def test_tenants_reach_the_engine(base, engine, registry, file):
    """What the engine is told decides whose prefix-cache blocks are shared."""
    told = []

    class Watching:
        def stream(self, request, tenant=""):
            told.append(tenant)
            return engine.stream(request, tenant)

    keys = [add_key(file, tenant, ("*",), 0, False)[1] for tenant in ("acme", "globex")]
    service = make_service(base, registry, engine, keys_file=str(file))
    service.backend.engine = Watching()
    calling(service, *[("POST", "/v1/chat/completions", key, ASK | {"model": "harbour"}) for key in keys])
    assert told == ["acme", "globex"]


def test_the_audit_log_tells_who_and_how_much_and_no_text(base, engine, registry, file, tmp_path):
    record, key = add_key(file, "acme", ("harbour",), 0, False)
    log = tmp_path / "audit.jsonl"
    service = make_service(base, registry, engine, keys_file=str(file), audit_log=str(log))
    chat = "/v1/chat/completions"
    whole, streamed, _, _, _ = calling(
        service, ("POST", chat, key, ASK | {"model": "harbour"}),
        ("POST", chat, key, ASK | {"model": "harbour", "stream": True}),
        ("POST", chat, key, ASK | {"model": "orchard"}), ("POST", chat, "ck_wrong", ASK | {"model": "harbour"}),
        ("GET", "/healthz", None, None))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 404, 401]
    usage = whole.json()["usage"]
    for line in lines[:2]:
        assert line["key"] == record.id and line["tenant"] == "acme" and line["asked"] == "harbour"
        assert line["completion_tokens"] == usage["completion_tokens"]
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["version"] == registry.resolve("harbour").version and line["seconds"] > 0
    assert "key" not in lines[3]
    text = log.read_text()
    answer = whole.json()["choices"][0]["message"]["content"]
    assert "secret question" not in text and key not in text and (not answer.strip() or answer not in text)
    assert streamed.status_code == 200 and stat.S_IMODE(log.stat().st_mode) == 0o600


def test_an_audit_log_that_cannot_be_opened_is_refused_and_a_lost_line_is_counted(base, engine, registry, tmp_path):
    nowhere = tmp_path / "none" / "audit.jsonl"
    unlogged = BuildSettings.model_validate({"serve": {"audit_log": str(nowhere)}})
    with pytest.raises(UserError, match="audit_log .* cannot be opened: No such file"), \
            running_service(str(tmp_path), unlogged):
        pass
    nowhere.parent.mkdir()
    service = make_service(base, registry, engine, audit_log=str(nowhere))
    app = create_app(service)
    nowhere.unlink()
    nowhere.parent.rmdir()

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/v1/models")).status_code

    assert asyncio.run(ask()) == 200
    assert value_of(service.metrics, "cartridges_audit_lost_total") == 1


def test_finding_a_key_compares_them_all(file, monkeypatch):
    """One comparison a record, whichever is the right one."""
    keys = [add_key(file, "a", ("*",), 0, False)[1] for _ in range(3)]
    gate, compared = Authenticator(str(file)), []
    real = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda *both: compared.append(1) or real(*both))
    for key in keys:
        gate.admit("", f"Bearer {key}")
    assert len(compared) == 9
