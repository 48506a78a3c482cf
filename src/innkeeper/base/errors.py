"""Every error a user can meet, named after what failed.

An error carries what was wrong (`detail`, with the offending value), what the user can do next (`hint`) and
machine-readable `facts`. `server/problems.py` turns it into HTTP problem+json (RFC 9457); nothing else does.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar


class InnkeeperError(Exception):
    """Base of all errors that are meant for a user.

    `status` is the HTTP status the API answers with; `code` is the stable name clients may test for.
    """

    status: ClassVar[int] = 500
    default_hint: ClassVar[str] = ""

    def __init__(self, detail: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint or self.default_hint
        self.facts = facts

    @property
    def code(self) -> str:
        """The class name in kebab case: `MachineBusy` → `machine-busy`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    def document(self) -> dict[str, Any]:
        """The error as JSON data, as the journal and the API keep it."""
        return {
            "code": self.code,
            "status": self.status,
            "detail": self.detail,
            "hint": self.hint,
            "facts": self.facts,
        }


# --- what was asked for is wrong ---


class InvalidInput(InnkeeperError):
    """A value has the wrong form; `facts["field"]` names it where there is one."""

    status = 422


class SeedInvalid(InvalidInput):
    """User-data, meta-data, network-config or an Ignition file that the guest would reject."""


class RecipeInvalid(InvalidInput):
    """A recipe file that does not say what to build."""


class ImageUnsafe(InvalidInput):
    """An image that points outside itself, or whose header lies about it (DESIGN.md 2.11)."""


class ImageFormatUnknown(InvalidInput):
    """The file is in no image format that Innkeeper reads."""


class DigestMismatch(InvalidInput):
    """Downloaded or stored bytes are not the ones that were promised."""


# --- what was asked for is not there, or there already ---


class NotFound(InnkeeperError):
    """No such VM, image, operation or file."""

    status = 404


class NameTaken(InnkeeperError):
    """Another object has this name."""

    status = 409


class Conflict(InnkeeperError):
    """The stored document changed since it was read (compare-and-set failed)."""

    status = 409


class InUse(InnkeeperError):
    """Others stand on this object; `facts["users"]` names them."""

    status = 409


class ImageChanged(InnkeeperError):
    """A file of an image is not as it was when the image was made; `facts["files"]` names it."""

    status = 409


class NotSealed(InnkeeperError):
    """A template would have in it what must not be there; `facts["findings"]` lists it."""

    status = 409


# --- the request is refused as things are ---


class ActionRefused(InnkeeperError):
    """The VM's state does not admit this action."""

    status = 409


class MachineBusy(InnkeeperError):
    """Another operation holds the VM; `facts["operation"]` is its id."""

    status = 409


class PortTaken(InnkeeperError):
    """A host port is in use; the detail says by whom."""

    status = 409


class AddressTaken(InnkeeperError):
    """A card has this MAC or IP address in the network already; the detail says whose."""

    status = 409


class NotEnoughMemory(InnkeeperError):
    """The host has not enough memory for this guest."""

    status = 409
    default_hint = "make it smaller, stop another VM, or pass --force to overcommit"


class PoolFull(InnkeeperError):
    """The file system of the pool has no room."""

    status = 507
    default_hint = "remove images or VMs that nobody needs, or enlarge the file system"


# --- the host or a guest did not do its part ---


class ToolMissing(InnkeeperError):
    """A program that this needs is not installed; `facts["package"]` is the Debian package that has it."""

    status = 501


class ToolFailed(InnkeeperError):
    """A host program ended with an error; the detail carries the end of its output."""

    status = 500


class ToolTimeout(ToolFailed):
    """A host program did not end within its deadline and was killed."""

    status = 504


class UnplugRefused(InnkeeperError):
    """The guest did not let go of a device."""

    status = 409
    default_hint = "a guest that boots, or has no PCI hot-plug, does not; stop the VM and try again"


class NetworkFailed(InnkeeperError):
    """The kernel, nft or dnsmasq did not do what a network needs."""

    status = 500


class DownloadFailed(InnkeeperError):
    """A URL could not be fetched."""

    status = 502


class QemuFailed(InnkeeperError):
    """QEMU did not start, or ended by itself; the detail carries its stderr."""

    status = 500


class QmpFailed(InnkeeperError):
    """QEMU refused a QMP command."""

    status = 500


class QemuGone(QmpFailed):
    """A VM's QEMU is ending in this moment, or does not answer at present."""

    status = 409
    default_hint = "inn info shows the VM's state a moment later"


class AgentUnavailable(InnkeeperError):
    """The guest agent does not answer."""

    status = 409
    default_hint = "the guest may still be booting, or has no qemu-guest-agent installed: see `inn logs`"


class AgentFailed(InnkeeperError):
    """The guest agent answered with an error."""

    status = 409


class BootTimeout(InnkeeperError):
    """The guest did not become ready in time; the detail has its last console lines."""

    status = 504


class Cancelled(InnkeeperError):
    """The operation was cancelled and what it had done was undone."""

    status = 409


class StepInterrupted(InnkeeperError):
    """The daemon died in the middle of an operation, which was undone when it came back."""

    status = 500


class DaemonUnreachable(InnkeeperError):
    """No daemon answers on the socket."""

    status = 503


class Unsupported(InnkeeperError):
    """This host, this image or this QEMU cannot do what was asked."""

    status = 409


class StoreFailed(InnkeeperError):
    """The store could not be read or written (disk full, damaged)."""

    status = 507
