"""Requests drawn from the service's own OpenAPI schema, and such as break it: an answer, or an error in shape."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.serve_support import listening, make_service

GENERATES = {"/v1/chat/completions", "/v1/completions"}


@pytest.fixture(scope="module")
def schema(base, engine, registry):
    with listening(make_service(base, registry, engine, max_tokens_limit=4, max_body_bytes=20_000)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def call(case, mode) -> int:
    if case.path in GENERATES and mode is GenerationMode.POSITIVE:
        case.body["model"] = "harbour"  # a drawn name would be nobody's
        case.body.pop("cartridges", None)
    response = case.call(timeout=60)
    assert response.status_code < 500, (response.text, case.body)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text
    return response.status_code


@pytest.mark.parametrize("mode", GenerationMode)
def test_any_request_has_an_answer_in_shape(schema, mode):
    operations = [found.ok() for found in schema.get_all_operations()]
    # What has no body cannot be malformed.
    seen = {one.path: statuses(one, mode) for one in operations if mode is GenerationMode.POSITIVE or one.body}
    assert set(seen) >= GENERATES
    if mode is GenerationMode.POSITIVE:
        assert all(seen[path][200] for path in GENERATES), seen
    else:
        assert not any(told[200] for told in seen.values()), seen


def statuses(operation, mode) -> Counter:
    """How often each status was the answer to requests drawn for `operation`."""
    told = Counter()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        told[call(case, mode)] += 1

    ask()
    return told
