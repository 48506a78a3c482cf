"""What the steps of operations may touch: handed to them whole, so that none of it is global."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from innkeeper.base.errors import NotFound, ToolMissing
from innkeeper.base.home import Home
from innkeeper.host.accelerator import Verdict
from innkeeper.host.facts import HostFacts, QemuFacts
from innkeeper.host.gather import gather
from innkeeper.machine.machines import Machines
from innkeeper.network.fabric import Fabric
from innkeeper.qemu.ram import RamImages
from innkeeper.store.contract import Document, Store, Value
from innkeeper.store.events import EventLog

FRESH = 0.2


@dataclass
class World:
    """One host, as operations see it."""

    home: Home
    store: Store
    events: EventLog
    machines: Machines
    verdict: Verdict
    qemu: QemuFacts | None
    ram: RamImages = field(default_factory=RamImages)
    fabric: Fabric = field(init=False)
    outer_addresses: dict[tuple[str, int], str] = field(default_factory=dict)
    """By VM and NIC, of those in bridged networks and on interfaces of the host, as far as their agents have told."""
    _host: tuple[float, HostFacts | None] = (0.0, None)

    def __post_init__(self) -> None:
        self.fabric = Fabric(self.home.networks, self.home.data)

    async def host(self, age: float = FRESH) -> HostFacts:
        """The facts, `age` seconds old at most: an operation asks several times."""
        read, facts = self._host
        if facts is None or monotonic() - read > age:
            facts = await gather(self.home, self.verdict, self.qemu)
            self._host = (monotonic(), facts)
        return facts

    async def host_with_qemu(self, age: float = FRESH) -> HostFacts:
        """The same; `ToolMissing` where there is no QEMU."""
        if self.qemu is None:
            raise ToolMissing(
                "qemu-system-x86_64 is not installed",
                hint="apt install qemu-system-x86, then inn daemon stop && inn daemon start",
                package="qemu-system-x86",
            )
        return await self.host(age)

    async def find(self, kind: str, name: str) -> Value:
        """The document of a VM, image or network by name or id. Raises `NotFound`."""
        pointer = await self.store.get(f"name/{kind}/{name}")
        document = await self.store.get(f"{kind}/{pointer.value['id'] if pointer else name}")
        if document is None and kind == "image":
            document = await self._newest(name)
        if document is None:
            command = "inn ls" if kind == "vm" else f"inn {kind} ls"
            noun = "VM" if kind == "vm" else kind
            raise NotFound(f"there is no {noun} {name!r}", hint=f"{command} shows what there is", name=name)
        return document.value

    async def _newest(self, template: str) -> Document | None:
        """Of a template's versions the one that was sealed last."""
        versions = await self.store.list(f"name/image/{template}:")
        found = [await self.store.get(f"image/{version.value['id']}") for version in versions]
        sealed = [document for document in found if document is not None and document.value["kind"] == "template"]
        return max(sealed, key=lambda document: str(document.value["created"]), default=None)

    async def vms(self) -> list[Value]:
        """All VM documents."""
        return [document.value for document in await self.store.list("vm/")]
