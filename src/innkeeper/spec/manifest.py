"""Declarative files for `inn apply`: YAML documents with a kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from innkeeper.spec.quantity import ImageName, Model
from innkeeper.spec.vm import VMSpec


class VMManifest(VMSpec):
    """A VM that should exist. `state` is what `apply` brings about."""

    kind: Literal["vm"] = "vm"
    state: Literal["running", "stopped"] = "running"

    def spec(self) -> VMSpec:
        """The VM alone."""
        return VMSpec.model_validate(self.model_dump(exclude={"kind", "state"}))


class ImageManifest(Model):
    """An image that should exist, built from a recipe."""

    kind: Literal["image"]
    name: ImageName
    recipe: ImageName


Manifest = Annotated[VMManifest | ImageManifest, Field(discriminator="kind")]
