"""The routes under the hosts' versions of FastAPI and pydantic; each in the small environment of its Gradio."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROUTES = [f"/klora/v1/{name}" for name in ("analyze", "schema", "version")]


@pytest.fixture(scope="module", params=["KLORA_GRADIO3_PYTHON", "KLORA_GRADIO4_PYTHON"])
def answers(request: pytest.FixtureRequest) -> Any:
    python = os.environ.get(request.param)
    if not python:
        pytest.skip(f"{request.param} names no environment with FastAPI")
    run = subprocess.run(
        [python, str(Path(__file__).with_name("routes.py"))], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_a_good_body_is_answered(answers: Any) -> None:
    assert answers["open"]["good"] == [200, {"schema": 1, "subject": "dog"}]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ("bad", 422, "beta"),
        ("unknown key", 422, "bta"),
        ("missing", 404, "style"),
        ("other", 422, None),
        ("list", 422, "body"),
    ],
)
def test_a_bad_body_is_refused_with_field_and_reason(answers: Any, body: str, status: int, field: str | None) -> None:
    found, said = answers["open"][body]
    assert (found, said["field"]) == (status, field)
    assert said["reason"]


def test_version_and_schema_are_told(answers: Any) -> None:
    assert answers["open"]["version"][1].keys() == {"version", "api"}
    assert answers["open"]["schema"][1]["type"] == "object"


def test_api_auth_guards_every_route(answers: Any) -> None:
    guarded = answers["guarded"]
    assert [guarded[name][0] for name in ("good", "bad", "schema", "version")] == [401] * 4
    assert [guarded[name][0] for name in ("right", "wrong", "nobody")] == [200, 401, 401]


def test_routes_added_twice_are_there_once_and_described(answers: Any) -> None:
    assert answers["open"]["routes"] == ROUTES
    assert answers["open"]["described"] == 200
