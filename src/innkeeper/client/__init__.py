"""The Python SDK: `from innkeeper.client import Innkeeper`. Sees only the REST API; imports base.

Everything is synchronous, documents are plain dicts as the API describes them (`/openapi.json`), and what takes time
is an `Operation`. Errors: `ApiError` (the daemon refused or failed; code, detail, hint, facts), `DaemonUnreachable`
(nobody answers), `SocketForbidden` (this user may not ask).
"""

from innkeeper.client.api import Innkeeper
from innkeeper.client.errors import ApiError, DaemonUnreachable, SocketForbidden
from innkeeper.client.operation import Operation
from innkeeper.client.vm import VM, Result
from innkeeper.client.wishes import vm_spec

__all__ = [
    "VM",
    "ApiError",
    "DaemonUnreachable",
    "Innkeeper",
    "Operation",
    "Result",
    "SocketForbidden",
    "vm_spec",
]
