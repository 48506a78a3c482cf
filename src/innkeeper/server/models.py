"""Shapes of requests and answers that are not specs: what OpenAPI shows. Answers are documents, sent as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from innkeeper.spec.firewall import FirewallChange, FirewallRule
from innkeeper.spec.network import Mode
from innkeeper.spec.quantity import ImageName, ImageReference, Model, Name
from innkeeper.spec.vm import VMSpec
from innkeeper.spec.wiring import Change


class Open(BaseModel):
    """Answers may grow fields; clients ignore those they do not know."""

    model_config = ConfigDict(extra="allow")


class Problem(Open):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    facts: dict[str, JsonValue]


class OperationView(Open):
    id: str
    revision: int
    kind: str
    target: dict[str, JsonValue]
    state: Literal["running", "undoing", "done", "failed", "cancelled"]
    steps: list[str]
    step: str
    progress: dict[str, JsonValue]
    created: str
    updated: str
    ended: str | None
    error: dict[str, JsonValue] | None
    result: dict[str, JsonValue]
    cancel_requested: bool


class ActionView(Open):
    allowed: bool
    reason: str
    hint: str


class VMView(Open):
    id: str
    name: str
    state: str
    reason: str
    since: str
    created: str
    image: str | None
    cpus: int
    memory: int
    spec: dict[str, JsonValue]
    operation: dict[str, JsonValue] | None
    ready: bool
    agent: bool
    pending: bool
    pid: int | None
    address: str | None
    ssh_port: int | None
    forwards: list[dict[str, JsonValue]]
    user: str
    disc: str | None
    memory_used: dict[str, int] | None = Field(
        default=None, description="Of one VM, or where asked for: bytes, private and shared (PSS)"
    )
    machine: dict[str, JsonValue]
    allowed_actions: dict[str, ActionView]


class EventView(Open):
    seq: int
    at: str
    kind: str
    level: Literal["info", "warning", "error"]
    target: dict[str, JsonValue] | None
    text: str
    facts: dict[str, JsonValue]


class VersionView(Open):
    version: str
    pid: int
    started: str
    home: str


class ImageView(Open):
    id: str
    name: str
    kind: Literal["disk", "kernel", "warm", "template"]
    virtual_size: int
    stored_size: int


class HistoryView(Open):
    """`line`: the image and what it stands on, each on the next; `versions`: of a template, the newest first."""

    line: list[dict[str, JsonValue]]
    versions: list[dict[str, JsonValue]]


class NetworkView(Open):
    """`cards`: {name, nic, address} of each card that is in it, by VM. A bridged network has a `parent`, and no
    addresses of its own."""

    id: str
    name: str
    mode: Mode
    state: Literal["creating", "active", "deleting"]
    parent: str | None
    mtu: int | None
    subnet: str | None
    prefix: str | None
    gateway: str | None
    gateway6: str | None
    domain: str
    bridge: str
    note: str
    created: str
    operation: dict[str, JsonValue] | None
    cards: list[dict[str, JsonValue]]


class DoctorRequest(Model):
    """Put right what is safe to, of one network or of all."""

    network: Name | None = None


class FindingView(Open):
    """`fix`: commands that end it; `fixable`: asked to fix, the daemon does it itself; `fixed`: it just did."""

    code: str
    level: Literal["error", "warning", "note"]
    networks: list[str]
    what: str
    evidence: list[str]
    consequence: str
    fix: list[str]
    fixable: bool
    fixed: bool


class CheckRequest(Model):
    """Where a guest is to connect to."""

    host: str = Field(
        pattern=r"^[A-Za-z0-9:][A-Za-z0-9:._-]{0,253}$", description="An address, or a name that the guest resolves"
    )
    port: int = Field(ge=1, le=65535)
    protocol: Literal["tcp", "udp"] = "tcp"


class CheckView(Open):
    """`hops`: {name, passed, text, evidence} of each part of the way, as far as it goes; `passed` and `reached` null
    where nobody can tell."""

    vm: str
    reached: bool | None
    hops: list[dict[str, JsonValue]]


class NicView(Open):
    """`index`: its number, which it keeps; `limit`: bits per second in each direction. The tap is that of a card in a
    network, or the macvtap of one on `parent`, an interface of the host; `function`, while it runs, the PCI address of
    its virtual function. Where the network outside gives addresses, the guest's agent tells them. `dropped`: packets
    that it sent as somebody else, or as only a router may, since its rules were made."""

    index: int
    mode: Literal["user", "network", "macvtap", "sriov", "none"]
    network: str | None
    backend: Literal["qemu", "passt"] | None
    parent: str | None
    vlan: int | None
    function: str | None
    model: str
    mac: str
    limit: int | None
    link: Literal["up", "down"]
    address: str | None
    address6: str | None
    tap: str | None
    dropped: int | None


class FirewallRuleView(FirewallRule):
    """`packets` and `bytes` that it has judged since the rules were last changed."""

    number: int
    packets: int
    bytes: int


class FirewallView(Open):
    """What a VM's cards in networks let in and out: the first rule that fits counts, then `inbound` or `outbound`.
    `defaults`: packets that these have judged."""

    vm: str
    inbound: Literal["allow", "deny"]
    outbound: Literal["allow", "deny"]
    tags: list[str]
    rules: list[FirewallRuleView]
    defaults: dict[Literal["in", "out"], int]


class DeniedView(Open):
    """What was denied: `packets` from or to `peer`, the last of them at `last`. `name` is the peer's where it is a
    guest or the host, `port` the receiver's, `rule` the number of the rule that denies it as the rules are now, null
    for the default."""

    nic: int
    direction: Literal["in", "out"]
    protocol: str
    peer: str
    name: str | None
    port: int | None
    packets: int
    last: str
    rule: int | None


class PortView(Open):
    """A host port that leads into a VM. `packets` and `bytes` came for it since the daemon's start, the last of them
    before `last`; null where QEMU's own NAT has it, which does not count."""

    vm: str
    nic: int
    network: str | None
    protocol: Literal["tcp", "udp"]
    address: str
    host: int
    guest: int
    to: str | None
    note: str
    by: str
    since: str
    packets: int | None
    bytes: int | None
    last: str | None


class RecipeView(Open):
    name: str
    title: str


class SSHView(Open):
    address: str
    port: int
    user: str
    host_key: str
    alias: str


class VMRequest(Model):
    """Make a VM."""

    spec: VMSpec
    start: bool = Field(default=True, description="Start it once it is made")
    wait: bool = Field(default=True, description="The operation ends when the guest is ready, not when it runs")
    force: bool = Field(default=False, description="Start even where the host has too little memory")
    timeout: float | None = Field(default=None, gt=0, le=86400, description="Seconds until the guest must be ready")


class WarmRequest(Model):
    """Boot an image, wait until its guest is ready, and capture it: a warm image, to fork."""

    image: ImageReference
    name: ImageName | None = Field(default=None, description="The image's name and `-warm` by default")
    spec: VMSpec = Field(description="What its forks will be; the name is that of the VM while it boots")
    until: str | None = Field(
        default=None, max_length=65536, description="Shell command in the guest that has to end well before"
    )
    refresh: bool = Field(default=False, description="Make it anew where there is one")
    timeout: float | None = Field(default=None, gt=0, le=86400, description="Seconds until the guest must be ready")


class ForkRequest(Model):
    """Running copies of a warm image, or of a VM that runs."""

    source: ImageReference = Field(
        description="A warm image, or one that has a warm image named after it; where there is none, a VM"
    )
    snapshot: Name | None = Field(
        default=None, description="Of the VM, with memory: what the forks go on from instead of what it does now"
    )
    names: list[Name] = Field(min_length=1, max_length=1000, description="One fork for each")
    network: Name | None = Field(
        default=None, description="The network that the first card is plugged into; where the source was when absent"
    )
    force: bool = Field(default=False, description="Also where the host has too little memory for all of them")
    ttl: float | None = Field(default=None, gt=0, le=31536000, description="Seconds after which a fork is deleted")


class ForkView(Model):
    """The operations to follow, one for each name."""

    operations: list[str]


class CloneRequest(Model):
    """A VM of its own with the disks of another."""

    name: Name
    linked: bool = Field(
        default=False, description="Share the source's layers instead of copying them: it cannot be deleted then"
    )
    keep_identity: bool = Field(
        default=False, description="UUID, MACs, hostname, machine-id, SSH host keys as they are"
    )
    quiesce: bool = Field(default=False, description="Have the source's guest freeze its file systems for the moment")


class ActionRequest(Model):
    """How to do it."""

    force: bool = False
    timeout: float | None = Field(default=None, gt=0, le=86400, description="Seconds the guest gets to shut down")


class NicsRequest(Model):
    """Change the cards of a VM, or the ports that lead to them."""

    change: Change
    by: str = Field(default="", max_length=200, description="Who asks for it, for people")


class FirewallRequest(Model):
    """Change a VM's firewall rules or tags."""

    change: FirewallChange


class SnapshotRequest(Model):
    """A snapshot of all disks at one point in time."""

    name: Name | None = Field(default=None, description="`snap-1` and so on by default")
    note: str = Field(default="", max_length=4096)
    ttl: float | None = Field(
        default=3 * 86400, gt=0, le=315360000, description="Seconds after which it is removed; null: never"
    )
    quiesce: bool = Field(default=False, description="Have the guest freeze its file systems, through its agent")
    memory: bool = Field(default=False, description="Memory and devices too, so that a restore goes on from there")


class RestoreRequest(Model):
    """Go back to a snapshot."""

    keep: bool = Field(default=True, description="Keep the present as an automatic snapshot")
    start: bool = Field(
        default=False, description="Start it then, as with memory always; one that runs has its power cut first"
    )
    disks_only: bool = Field(default=False, description="Boot, although memory is part of the snapshot")
    paused: bool = Field(default=False, description="With memory: leave the guest paused where it was")
    force: bool = Field(default=False, description="Cut the power of one that runs")
    ttl: float | None = Field(
        default=3 * 86400, gt=0, le=315360000, description="Seconds for which the present is kept; null: for good"
    )


class PruneRequest(Model):
    """What goes besides expired snapshots, removals that were not finished, and layers that nobody needs."""

    automatic: bool = Field(default=False, description="The snapshots that restores made, too")


class SnapshotView(Open):
    """`stored_size`: bytes of its own layers, and of memory. `memory`: its size in bytes, and for how
    many seconds the guest stood still; null for none. `layers`: of how
    many its disks consist. `here`: the present stands on it. A `deleting` one cannot be restored any more."""

    id: str
    vm: str
    name: str
    created: str
    note: str
    expires: str | None
    automatic: bool
    state: Literal["whole", "deleting"]
    taken: str
    quiesced: bool
    parent: str | None
    here: bool
    stored_size: int
    memory: dict[str, JsonValue] | None
    layers: int
    nvram: bool


class SnapshotList(Open):
    """`present`: the snapshot it stands on, its layers and how many there may be, bytes written since."""

    snapshots: list[SnapshotView]
    present: dict[str, JsonValue]


class ExecRequest(Model):
    """A command for the guest agent to run, without a shell."""

    argv: Annotated[list[Annotated[str, Field(max_length=131072)]], Field(min_length=1, max_length=4096)]
    env: dict[str, str] = Field(default={}, description="Added to the environment")
    cwd: str | None = None
    stdin: str | None = Field(default=None, description="Standard input, base64, up to 1 MiB")
    stdin_path: str | None = Field(default=None, description="A file in the guest to be standard input")
    timeout: float | None = Field(default=None, gt=0, le=86400, description="Seconds; the command is killed then")


class ApplyRequest(Model):
    """Declarative documents, as `inn apply` reads them from YAML."""

    documents: list[dict[str, JsonValue]] = Field(max_length=1000)
    dry_run: bool = False


class ManifestChange(Model):
    """What `apply` does about one document."""

    kind: Literal["vm", "image"]
    name: str
    action: Literal["none", "create", "update", "start", "stop", "build"]
    differences: list[dict[str, Any]]
    note: str = ""


class ApplyView(Model):
    changes: list[ManifestChange]
    operations: list[str]


class Export(Open):
    kind: Literal["vm"]
    name: Name
