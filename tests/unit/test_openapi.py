"""The API's contract, pinned: a changed line in docs/openapi.json is a decision."""

import json
import os
from pathlib import Path

from innkeeper.machine.states import ACTIONS
from innkeeper.server.app import openapi

PINNED = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_is_the_pinned_one():
    text = json.dumps(openapi(), indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_OPENAPI"):
        PINNED.write_text(text)
    assert PINNED.read_text() == text, (
        "run UPDATE_OPENAPI=1 pytest tests/unit/test_openapi.py and look at the difference"
    )


def test_every_route_documents_its_problems():
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            for status in ("404", "409", "422"):
                content = operation["responses"][status]["content"]
                assert "application/problem+json" in content, (method, path, status)
            assert operation["summary"], (method, path)


def test_every_action_of_the_table_has_a_route():
    routes = openapi()["paths"]
    named = set(openapi()["components"]["schemas"]["Action"]["enum"])
    elsewhere = {"delete": "/v1/vms/{vm}", **{a: f"/v1/vms/{{vm}}/{a}" for a in ("exec", "screenshot", "clone")}}
    elsewhere |= {"snapshot": "/v1/vms/{vm}/snapshots", "restore": "/v1/vms/{vm}/snapshots/{snapshot}/restore"}
    elsewhere |= {"fork": "/v1/forks", "nics": "/v1/vms/{vm}/nics", "firewall": "/v1/vms/{vm}/firewall"}
    for action in ACTIONS:
        assert action in named or elsewhere.get(action) in routes or action == "console", action
