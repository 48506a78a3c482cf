"""Arguments that several commands of `inn` take, and the groups that `inn help` shows."""

from __future__ import annotations

from innkeeper.cli.parser import duration, rate, size
from innkeeper.cli.table import Argument as A

FORMATS = ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc")

VM = A(("vm",), "name or id of the VM", {"metavar": "VM"}, "vm")
VMS = A(("vms",), "names or ids of VMs", {"metavar": "VM", "nargs": "+"}, "vm")
IMAGE = A(("image",), "name of the image", {"metavar": "IMAGE"}, "image")
NO_WAIT = A(("--no-wait",), "return at once and print the operation's id", {"action": "store_true"})
FOLLOW = A(("-f", "--follow"), "go on as more comes, until ctrl-C", {"action": "store_true"})
FORMAT = A(("--format",), "its format, told from the file's header by default", {"choices": FORMATS})
TIMEOUT = A(
    ("--timeout",), "how long the guest may take, like 90s; then it fails", {"metavar": "TIME", "type": duration}
)

CPUS = A(("--cpus",), "vCPUs (default 2)", {"metavar": "N", "type": int})
DISK = A(
    ("--disk",),
    "size of the first disk, like 20G (default 20G); repeat for more disks",
    {"metavar": "SIZE", "action": "append", "type": size},
)
FIRMWARE = A(("--firmware",), "bios (default) or uefi", {"choices": ("bios", "uefi")})
SSH_KEY = A(
    ("--ssh-key",),
    "public key, or private key beside its .pub; by default those in ~/.ssh, or one that is made",
    {"metavar": "FILE", "action": "append"},
    "file",
)
ADDRESS = A(("--address",), "its IPv4 address in the network; a free one by default", {"metavar": "ADDRESS"})
NETWORK = A(("--network",), "network to join, made with inn network create", {"metavar": "NETWORK"}, "network")
MACVTAP = A(
    ("--macvtap",),
    "interface of the host, like eth0, whose network the guest is in, past the host itself",
    {"metavar": "INTERFACE"},
)
MACVTAP_MODE = A(
    ("--macvtap-mode",),
    "to other guests on that interface: bridge (default), directly; vepa, by the switch outside; private, not at all",
    {"choices": ("bridge", "vepa", "private")},
)
SRIOV = A(
    ("--sriov",), "interface of the host of which the guest gets a virtual function (SR-IOV)", {"metavar": "INTERFACE"}
)
VLAN = A(("--vlan",), "VLAN outside that the virtual function is in", {"metavar": "N", "type": int})
LIMIT = A(
    ("--limit",),
    "most that it sends, and most that it receives, per second, like 100mbit",
    {"metavar": "RATE", "type": rate},
)
USER_DATA = A(("--user-data",), "cloud-init user-data; - is stdin", {"metavar": "FILE"}, "file")

SNAPSHOT = A(("snapshot",), "name or id of the snapshot", {"metavar": "SNAP"})

MACHINES, IMAGES, SNAPSHOTS, COPIES_OF, BETWEEN, INSIDE, AS_FILES, HOST = (
    "Virtual machines",
    "Images",
    "Snapshots",
    "Clones, templates, forks",
    "Networks",
    "Inside a guest",
    "Declarative files",
    "Host and daemon",
)
