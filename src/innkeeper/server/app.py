"""The application: routes, errors, OpenAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from innkeeper import __version__
from innkeeper.server import (
    problems,
    routes_apply,
    routes_firewall,
    routes_forks,
    routes_guest,
    routes_host,
    routes_images,
    routes_networks,
    routes_nics,
    routes_snapshots,
    routes_vms,
)
from innkeeper.server.context import Context


def create_app(context: Context | None = None) -> FastAPI:
    """The API over one daemon's context; without one, only good for its OpenAPI document."""
    app = _App(
        title="Innkeeper",
        version=__version__,
        summary="Virtual machines that are quick to make, cheap to keep and hard to lose",
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses=problems.RESPONSES,
        generate_unique_id_function=_operation_id,
    )
    app.state.context = context
    for module in (
        routes_host, routes_forks, routes_images, routes_networks, routes_nics, routes_firewall, routes_vms,
        routes_snapshots,
        routes_guest, routes_apply,
    ):  # fmt: skip
        app.include_router(module.router)
    problems.install(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def openapi() -> dict[str, Any]:
    """The OpenAPI document, as `docs/openapi.json` keeps it."""
    return create_app().openapi()


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI puts every answer's schema under application/json; problems have a media type of their own."""
        if self.openapi_schema is None:
            document = super().openapi()
            for operation in (o for methods in document["paths"].values() for o in methods.values()):
                for status, answer in operation["responses"].items():
                    if status >= "400":
                        answer["content"] = {problems.MEDIA: next(iter(answer["content"].values()))}
        assert self.openapi_schema is not None
        return self.openapi_schema
