"""Ask the routes of a small FastAPI app, with the hosts' versions of it, and print the answers."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastapi import FastAPI
from fastapi.testclient import TestClient

from klora.errors import KloraError
from klora.webui import api
from klora.webui.args import read_values


def analysis(body: Any) -> dict[str, Any]:
    """Stand for the analysis of files, which needs torch."""
    if not isinstance(body, dict):
        raise api.SettingsError("body", "must be an object")
    request = read_values(body)
    if request.style == "missing":
        raise api.UnknownLoraError("style", "there is no LoRA named 'missing'")
    if request.style == "other":
        raise KloraError("for another model")
    return {"schema": 1, "subject": request.subject}


def answers(api_auth: str | None) -> dict[str, Any]:
    """Ask everything once."""
    shared = types.ModuleType("modules.shared")
    shared.cmd_opts = types.SimpleNamespace(api_auth=api_auth)  # type: ignore[attr-defined]
    sys.modules.update({"modules": types.ModuleType("modules"), "modules.shared": shared})
    app = FastAPI()
    # Twice, as where an app lives through a reload.
    api.add_routes(None, app)
    api.add_routes(None, app)
    client = TestClient(app)
    pair = {"subject": "dog", "style": "ink"}
    bodies = {
        "good": pair,
        "bad": {**pair, "beta": -1},
        "unknown key": {**pair, "bta": 1},
        "missing": {**pair, "style": "missing"},
        "other": {**pair, "style": "other"},
        "list": [1],
    }
    found = {name: _seen(client.post(api.ANALYZE, json=body)) for name, body in bodies.items()}
    found["version"], found["schema"] = _seen(client.get(api.VERSION)), _seen(client.get(api.SCHEMA))
    for name, auth in {"right": ("u", "p:w"), "wrong": ("u", "p"), "nobody": ("é", "")}.items():
        found[name] = _seen(client.get(api.VERSION, auth=(auth[0].encode(), auth[1].encode())))
    found["routes"] = sorted(r.path for r in app.routes if "klora" in r.path)
    found["described"] = client.get("/openapi.json").status_code
    return found


def _seen(response: Any) -> list[Any]:
    return [response.status_code, response.json()]


if __name__ == "__main__":
    api.analysis = analysis
    print(json.dumps({"open": answers(None), "guarded": answers("u:p:w,other:q")}))
