"""SR-IOV against a sysfs made here, which does what the kernel does when it is written to: no such card is at hand."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from innkeeper.base.errors import ActionRefused, InvalidInput, NetworkFailed, Unsupported
from innkeeper.network import sriov
from innkeeper.operations.host_cards import check_saved
from innkeeper.plan.sriov import Card, Function, Wanted, choose
from innkeeper.qemu.process import _may_lock
from innkeeper.spec.vm import VMSpec

ADDRESSES = [f"0000:3b:02.{n}" for n in range(4)]


class Kernel:
    """A sysfs with the card ens1f0 and four functions, each in an IOMMU group of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.devices, self.set = root, root / "bus/pci/devices", []
        self.vfio = root.parent / "vfio"
        self.refuses = ""
        self.vfio.mkdir(parents=True)
        for driver in ("iavf", "vfio-pci"):
            (root / "bus/pci/drivers" / driver).mkdir(parents=True)
        pf = self.devices / "0000:3b:00.0"
        (root / "class/net/ens1f0").mkdir(parents=True)
        pf.mkdir(parents=True)
        (root / "class/net/ens1f0/device").symlink_to(pf)
        (pf / "sriov_totalvfs").write_text("64\n")
        for number, address in enumerate(ADDRESSES):
            self.add(address, group=20 + number)
            (pf / f"virtfn{number}").symlink_to(self.devices / address)
            self.bind(address, "iavf")

    def add(self, address: str, group: int, kind: str = "0x020000\n") -> None:
        device, members = self.devices / address, self.root / f"kernel/iommu_groups/{group}/devices"
        device.mkdir()
        (device / "class").write_text(kind)
        (device / "driver_override").write_text("(null)\n")
        members.mkdir(parents=True, exist_ok=True)
        (device / "iommu_group").symlink_to(members.parent)
        (members / address).symlink_to(device)

    def bind(self, address: str, driver: str) -> None:
        (self.devices / address / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
        if driver == "vfio-pci":
            (self.vfio / (self.devices / address / "iommu_group").resolve().name).touch()

    def driver(self, address: str) -> str:
        link = self.devices / address / "driver"
        return link.resolve().name if link.exists() else ""

    def write(self, path: Path, text: str) -> None:
        if self.refuses and self.refuses in str(path):
            raise NetworkFailed(f"{path} does not take it")
        if path.name == "unbind":
            if self.driver(text) == "vfio-pci":
                (self.vfio / (self.devices / text / "iommu_group").resolve().name).unlink()
            (self.devices / text / "driver").unlink()
        elif path.name == "driver_override":
            path.write_text(text if text.strip() else "(null)\n")
        elif path.name == "drivers_probe":
            wanted = (self.devices / text / "driver_override").read_text().strip()
            self.bind(text, "iavf" if wanted == "(null)" else wanted)
        else:
            raise AssertionError(path)

    async def set_function(self, parent: str, index: int, **settings: object) -> None:
        self.set.append((parent, index, settings))

    def state(self) -> list[tuple[str, str]]:
        return [(self.driver(a), (self.devices / a / "driver_override").read_text().strip()) for a in ADDRESSES]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    made = Kernel(tmp_path / "sys")
    monkeypatch.setattr(sriov, "SYSFS", made.root)
    monkeypatch.setattr(sriov, "VFIO_DEVICES", made.vfio)
    monkeypatch.setattr(sriov, "write", made.write)
    monkeypatch.setattr(sriov, "set_function", made.set_function)
    monkeypatch.setattr(sriov, "TRIES", 2)
    return made


@pytest.fixture
def records(tmp_path):
    return tmp_path / "networks"


def wanted(vm="a" * 12, index=0, vlan=None, uid=None):
    return Wanted(vm, index, "ens1f0", "52:54:00:00:00:01", vlan, uid)


async def test_a_function_is_given_and_taken_back(kernel, records):
    before = kernel.state()
    assert await sriov.take(wanted(vlan=100), records) == ADDRESSES[0]
    assert kernel.set == [("ens1f0", 0, {"mac": "52:54:00:00:00:01", "vlan": 100, "spoofchk": 1})]
    assert kernel.state()[0] == ("vfio-pci", "vfio-pci")
    assert (kernel.vfio / "20").exists()
    assert sriov.functions_of("a" * 12, records) == {0: ADDRESSES[0]}
    assert await sriov.take(wanted("b" * 12), records) == ADDRESSES[1]
    await sriov.leave_only("a" * 12, [0], records)
    assert kernel.state()[0] == ("vfio-pci", "vfio-pci")
    for _ in range(2):  # it may be asked for again
        await sriov.leave_only("a" * 12, (), records)
        assert kernel.state() == [before[0], ("vfio-pci", "vfio-pci"), *before[2:]]
    assert kernel.set[-1] == ("ens1f0", 0, {"mac": "00:00:00:00:00:00", "vlan": 0})
    await sriov.sweep(["b" * 12], records)
    assert sriov.functions_of("b" * 12, records)
    await sriov.sweep([], records)
    assert kernel.state() == before and list(records.iterdir()) == []


async def test_what_somebody_had_made_of_it_is_put_back(kernel, records):
    kernel.write(kernel.devices / ADDRESSES[0] / "driver/unbind", ADDRESSES[0])
    kernel.write(kernel.devices / ADDRESSES[0] / "driver_override", "none-at-all")
    before = kernel.state()
    await sriov.take(wanted(), records)
    await sriov.leave_only("a" * 12, (), records)
    assert kernel.state() == before


@pytest.mark.parametrize("file", ["unbind", "driver_override", "drivers_probe"])
async def test_nothing_is_left_of_what_fails(kernel, records, file):
    before = kernel.state()
    kernel.refuses = file
    with pytest.raises(NetworkFailed):
        await sriov.take(wanted(), records)
    kernel.refuses = ""
    await sriov.sweep([], records)  # what could not be put back then is put back by whoever comes next
    assert kernel.state() == before and list(records.iterdir()) == []


async def test_a_card_that_refuses_a_setting_is_left_alone(kernel, records, monkeypatch):
    before = kernel.state()

    async def no(*_: object, **settings: object) -> None:
        if settings.get("spoofchk"):
            raise NetworkFailed("Operation not supported")

    monkeypatch.setattr(sriov, "set_function", no)
    with pytest.raises(NetworkFailed):
        await sriov.take(wanted(), records)
    assert kernel.state() == before and list(records.iterdir()) == []


async def test_no_device_of_the_group_is_a_failure(kernel, records, monkeypatch):
    before = kernel.state()
    monkeypatch.setattr(sriov, "VFIO_DEVICES", kernel.root / "nowhere")
    with pytest.raises(NetworkFailed, match="nowhere/20 is not there"):
        await sriov.take(wanted(), records)
    assert kernel.state() == before


async def test_a_daemon_killed_at_any_point_leaves_what_the_next_one_puts_back(kernel, records, monkeypatch):
    before = kernel.state()
    points = ["unbind", "driver_override", "drivers_probe"]
    for point in points:

        class Killed(BaseException):
            pass

        def die(path, text, point=point, killed=Killed):
            if path.name == point:
                raise killed
            kernel.write(path, text)

        monkeypatch.setattr(sriov, "write", die)
        monkeypatch.setattr(sriov, "give_back", _nothing)
        with pytest.raises(Killed):
            await sriov.take(wanted(), records)
        monkeypatch.undo()
        monkeypatch.setattr(sriov, "SYSFS", kernel.root)
        monkeypatch.setattr(sriov, "VFIO_DEVICES", kernel.vfio)
        monkeypatch.setattr(sriov, "write", kernel.write)
        monkeypatch.setattr(sriov, "set_function", kernel.set_function)
        await sriov.sweep([], records)
        assert kernel.state() == before and list(records.iterdir()) == [], point


async def _nothing(*_: object) -> None:
    return


async def test_after_a_reboot_an_old_record_changes_nothing(kernel, records):
    await sriov.take(wanted(), records)
    record = next(records.iterdir())
    text = record.read_text()
    await sriov.sweep([], records)
    record.write_text(json.dumps(json.loads(text) | {"address": "0000:99:00.0"}))
    before = kernel.state()
    await sriov.sweep([], records)
    assert kernel.state() == before and list(records.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a file is given away by root")
async def test_the_device_of_the_group_is_the_vms_users(kernel, records):
    await sriov.take(wanted(uid=1234567), records)
    assert (kernel.vfio / "20").stat().st_uid == 1234567


def test_what_is_there_is_read(kernel):
    assert sriov.read_card("ens1f0") == Card(
        "ens1f0", 64, tuple(Function(n, ADDRESSES[n], "iavf", "", 20 + n) for n in range(4))
    )
    kernel.add("0000:3b:1f.0", group=20)
    kernel.add("0000:3b:1e.0", group=20, kind="0x060400\n")
    (kernel.devices / ADDRESSES[1] / "net/ens1f0v1").mkdir(parents=True)
    (kernel.devices / ADDRESSES[1] / "net/ens1f0v1/flags").write_text("0x1003\n")
    first, second, *_ = sriov.read_card("ens1f0").functions
    assert first.beside == ("0000:3b:1f.0",) and second.up == ("ens1f0v1",)
    with pytest.raises(InvalidInput, match="no interface 'eth9'"):
        sriov.read_card("eth9")


FREE = tuple(Function(n, ADDRESSES[n], "iavf", "", 20 + n) for n in range(2))


@pytest.mark.parametrize(
    ("card", "taken", "vfio", "why"),
    [
        (Card("eth0", 0, ()), {}, True, "eth0 has no virtual functions"),
        (Card("eth0", 64, ()), {}, True, "can have 64 virtual functions, and has none now"),
        (Card("eth0", 4, (Function(0, "a", "iavf"),)), {}, True, "no IOMMU that is switched on"),
        (Card("eth0", 4, FREE), {}, False, "driver vfio-pci is not there"),
        (Card("eth0", 4, FREE), dict.fromkeys(ADDRESSES, "VM web"), True, "02.0 is that of VM web; 0000:3b:02.1"),
        (Card("eth0", 4, (Function(0, "a", group=1, beside=("b", "c")),)), {}, True, "its IOMMU group 1 with b, c"),
        (Card("eth0", 4, (Function(0, "a", "vfio-pci", group=1),)), {}, True, "used by another program"),
        (Card("eth0", 4, (Function(0, "a", "iavf", group=1, up=("e0",)),)), {}, True, "up on this host as e0"),
    ],
)  # fmt: skip
def test_why_there_is_none(card, taken, vfio, why):
    with pytest.raises((InvalidInput, Unsupported), match=why) as refused:
        choose(card, taken, vfio=vfio)
    assert refused.value.hint


def test_the_command_that_makes_some_is_said():
    with pytest.raises(Unsupported) as refused:
        choose(Card("ens1f0", 64, ()), {}, vfio=True)
    assert refused.value.hint == "echo 8 > /sys/class/net/ens1f0/device/sriov_numvfs"


def test_the_first_that_is_free_is_chosen():
    shared = Function(0, "x", group=1, beside=("y",))
    assert choose(Card("eth0", 9, (shared, *FREE)), {ADDRESSES[0]: "VM a"}, vfio=True) == FREE[1]


def test_memory_of_a_vm_with_a_function_is_not_saved():
    spec = VMSpec.model_validate({"name": "web", "image": "tiny", "nics": [{}, {"mode": "sriov", "parent": "ens1f0"}]})
    with pytest.raises(ActionRefused, match="web has a virtual function of ens1f0"):
        check_saved(spec, "web", "it cannot be captured")
    check_saved(spec.model_copy(update={"nics": spec.nics[:1]}), "web", "")


def test_what_is_started_may_lock_so_much_and_nothing_else_does():
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with _may_lock(64 << 10):
        said = subprocess.run(["sh", "-c", "ulimit -S -l"], capture_output=True, text=True, check=True).stdout
    assert said == "64\n"
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before


def test_a_limit_that_cannot_be_raised_is_said():
    code = (
        "import resource, os\nfrom innkeeper.qemu.process import let_lock\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n"
        "if os.geteuid() == 0: os.setuid(65534)\nlet_lock(0, 1 << 30)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert "QEMU cannot be allowed to lock 1073741824 bytes" in said
