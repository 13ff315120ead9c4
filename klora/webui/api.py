"""Routes beside the host's own: version, schema, analysis.

The body is a plain object: the hosts' versions of pydantic agree on nothing more.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from klora import __version__
from klora.errors import KloraError, SettingsError, named_by
from klora.settings import Settings, options
from klora.webui.args import FusionRequest, json_schema, read_values, truth

BASE = "/klora/v1"
VERSION, SCHEMA, ANALYZE = f"{BASE}/version", f"{BASE}/schema", f"{BASE}/analyze"


def add_routes(_demo: Any, app: Any) -> None:
    """Add the routes to the host's app; called by the host each time it has started one."""
    from fastapi import Body

    guard = _guard()

    def analyze(body: Any = Body(None)) -> Any:  # noqa: B008
        return _answer(body)

    # An app that has them already keeps none of what an earlier load has left.
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) not in (VERSION, SCHEMA, ANALYZE)]
    app.add_api_route(VERSION, version, methods=["GET"], dependencies=guard, tags=["K-LoRA"])
    app.add_api_route(SCHEMA, json_schema, methods=["GET"], dependencies=guard, response_model=None, tags=["K-LoRA"])
    app.add_api_route(ANALYZE, analyze, methods=["POST"], dependencies=guard, response_model=None, tags=["K-LoRA"])


def version() -> dict[str, str]:
    """Tell the version of K-LoRA and of these routes."""
    return {"version": __version__, "api": "v1"}


def _answer(body: Any) -> Any:
    from fastapi.responses import JSONResponse

    try:
        return JSONResponse(analysis(body))
    except SettingsError as error:
        return JSONResponse(_fault(error, error.field, error.reason), status_code=422)
    except UnknownLoraError as error:
        return JSONResponse(_fault(error, error.side, str(error)), status_code=404)
    except KloraError as error:
        return JSONResponse(_fault(error, None, str(error)), status_code=422)


def _fault(error: Exception, field: str | None, reason: str) -> dict[str, Any]:
    return {"error": type(error).__name__, "detail": str(error), "field": field, "reason": reason}


class UnknownLoraError(KloraError):
    """The host lists no LoRA of that name; `side` is subject or style."""

    def __init__(self, side: str, text: str) -> None:
        super().__init__(text)
        self.side = side


def analysis(body: Any) -> dict[str, Any]:
    """What `klora analyze --json` writes, for LoRAs that the host lists, without their folders.

    With the plan's warnings, and with "picture" the PNG in base64.

    Raises SettingsError, UnknownLoraError, or KloraError for files that do not go together.
    """
    from klora.pair import side_facts
    from klora.report.document import document
    from klora.report.overlap import overlap_of
    from klora.webui.analysis import draw, plan_of

    if not isinstance(body, Mapping):
        raise SettingsError("body", "must be a JSON object with subject, style and settings")
    values = dict(body)
    picture = truth("picture", values.pop("picture", False))
    steps = options()["steps"].read("steps", values.pop("steps", Settings().steps))
    request = read_values({name: value for name, value in values.items() if name not in ("enabled", "show_map")})
    request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, steps=steps))
    _check_names(request)
    pair, plan = plan_of(request)
    with named_by(*(Path(lora.where) for lora in pair.loras)):
        found = document(pair, plan, overlap_of(pair, plan))
    # Of its folders, a server tells nothing.
    found["subject"] |= side_facts(pair.subject, pair.cache)
    found["style"] |= side_facts(pair.style, pair.cache)
    found["warnings"] = list(plan.notices)
    if picture:
        buffer = io.BytesIO()
        draw(plan, f"{request.subject} × {request.style}").save(buffer, "PNG")
        found["picture"] = base64.b64encode(buffer.getvalue()).decode()
    return found


def _check_names(request: FusionRequest) -> None:
    from klora.hosts.webui.lora_library import Library
    from klora.webui.sides import find_side

    names = Library()
    for side in ("subject", "style"):
        try:
            find_side(getattr(request, side), side, names)
        except KloraError as error:
            raise UnknownLoraError(side, str(error)) from None


def credentials_of(api_auth: str | None) -> dict[str, str]:
    """Read `--api-auth user:password,…` as the host does."""
    pairs = (entry.partition(":") for entry in (api_auth or "").split(",") if entry)
    return {user: password for user, _, password in pairs}


def known_users(options: Any) -> dict[str, str]:
    """Who may use the host's own routes, by its command line; SD.Next calls its options otherwise than A1111."""
    known = credentials_of(getattr(options, "api_auth", None))
    if hasattr(options, "auth") and hasattr(options, "auth_file"):
        lines = [options.auth or ""]
        if options.auth_file:
            lines += Path(options.auth_file).read_text(encoding="utf8").splitlines()
        for user, password in credentials_of(",".join(lines)).items():
            known[user.replace('"', "").strip()] = password.replace('"', "").strip()
    return known


def is_allowed(known: Mapping[str, str], user: str, password: str) -> bool:
    """Whether a password is right, in a time that does not tell how much of it is."""
    expected = known.get(user)
    same = secrets.compare_digest(password.encode(), (expected or "").encode())
    return expected is not None and same


def _guard() -> list[Any]:
    """The dependencies that ask for what the host's own routes ask for."""
    known = known_users(importlib.import_module("modules.shared").cmd_opts)
    if not known:
        return []
    from fastapi import Depends
    from fastapi.security import HTTPBasic

    return [Depends(_checker(known, HTTPBasic()))]


def _checker(known: Mapping[str, str], scheme: Any) -> Callable[..., bool]:
    from fastapi import Depends, HTTPException

    def check(credentials: Any = Depends(scheme)) -> bool:  # noqa: B008
        if is_allowed(known, credentials.username, credentials.password):
            return True
        headers = {"WWW-Authenticate": "Basic"}
        raise HTTPException(status_code=401, detail="Incorrect username or password", headers=headers)

    return check
