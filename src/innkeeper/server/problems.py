"""Errors → HTTP problem+json (RFC 9457), in this one place."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from innkeeper.base.errors import InnkeeperError, InvalidInput
from innkeeper.server.models import Problem
from innkeeper.spec.quantity import said


def phrase(status: int) -> str:
    """The reason phrase of RFC 9110, which Python follows from 3.13 on."""
    return {413: "Content Too Large", 422: "Unprocessable Content"}.get(status) or HTTPStatus(status).phrase


MEDIA = "application/problem+json"
STATUSES = (404, 409, 422, 500, 501, 502, 503, 504, 507)
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": phrase(status)} for status in STATUSES if status != 500
}
"""What any route may answer besides its own success; a 500 is a bug and not part of the contract."""


def problem(document: dict[str, Any]) -> JSONResponse:
    """The answer for an error's document (`InnkeeperError.document`)."""
    code, status = document["code"], document["status"]
    body = {"type": f"urn:innkeeper:error:{code}", "title": code.replace("-", " "), **document}
    return JSONResponse(body, status_code=status, media_type=MEDIA)


def invalid(errors: list[Any]) -> InvalidInput:
    """A validation error as ours: which field, what is wrong, never the value of a field that may be secret."""
    found = [
        {"field": ".".join(str(part) for part in error["loc"] if part != "body"), "problem": said(error)}
        for error in errors
    ]
    text = "; ".join(f"{e['field']}: {e['problem']}" if e["field"] else e["problem"] for e in found[:5])
    return InvalidInput(text or "the request is not valid", errors=found)


def install(app: FastAPI) -> None:
    """Have every error answered as a problem."""

    @app.exception_handler(InnkeeperError)
    async def ours(_request: Request, error: InnkeeperError) -> JSONResponse:
        return problem(error.document())

    @app.exception_handler(RequestValidationError)
    async def request(_request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(invalid(list(error.errors())).document())

    @app.exception_handler(ValidationError)
    async def document(_request: Request, error: ValidationError) -> JSONResponse:
        return problem(invalid(list(error.errors())).document())

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        title = phrase(error.status_code)
        body = {"code": title.lower().replace(" ", "-"), "status": error.status_code, "detail": str(error.detail)}
        answer = problem(body | {"hint": "", "facts": {}})
        answer.headers.update(error.headers or {})
        return answer
