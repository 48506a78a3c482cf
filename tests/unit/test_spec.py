"""Specs: what they take, what they make of it, and what they say when they refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from innkeeper.base.units import format_rate
from innkeeper.spec.disk import DiskSpec
from innkeeper.spec.image import BuildRequest, ImportRequest, PullRequest
from innkeeper.spec.manifest import ImageManifest, Manifest, VMManifest
from innkeeper.spec.nic import NicSpec, PortForward
from innkeeper.spec.vm import MAX_SEED, FirstBoot, VMSpec

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIH4vZ5bUu1Zs8eQ0m1Xn0e4u5m8m1lqg0o6J5mXw7q9T"
GIB = 1 << 30


def vm(**fields) -> VMSpec:
    return VMSpec.model_validate({"name": "web", "image": "debian-12"} | fields)


def refusal(make, *fields: str) -> str:
    """The message of the one refusal, which names the field."""
    with pytest.raises(ValidationError) as caught:
        make()
    (problem,) = caught.value.errors()
    assert tuple(str(part) for part in problem["loc"]) == fields, problem
    return problem["msg"]


def test_what_one_gets_without_asking():
    spec = vm()
    assert (spec.cpus, spec.memory, spec.firmware) == (2, 2 * GIB, "bios")
    assert spec.disks == (DiskSpec(size=20 * GIB),) and spec.nics == (NicSpec(),)
    assert spec.nics[0].mode == "user" and spec.disks[0].bus == "virtio-blk"


@pytest.mark.parametrize("name", ["a", "a" * 63, "web-1", "0", "x--y"])
def test_names(name):
    assert vm(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a.b", "a_b", "a" * 64, "a b", "a\n", "é", "a,b", "../a", None, 5]
)
def test_no_names(name):
    refusal(lambda: vm(name=name), "name")


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 * GIB),
        ("1.5G", 3 << 29),
        ("2048MiB", 2 * GIB),
        (2 * GIB, 2 * GIB),
        ("1t", 1 << 40),
    ],
)
def test_memory_as_people_write_it(written, size):
    assert vm(memory=written).memory == size


@pytest.mark.parametrize("memory", ["2X", "", "-1G", -1, True, 1.5e9, None, [], "1e3", "15M", "17T", 16 * 1024**2 + 1])
def test_no_memory(memory):
    message = refusal(lambda: vm(memory=memory), "memory")
    assert message


def test_the_message_shows_the_form():
    assert "512M, 2G" in refusal(lambda: vm(memory="lots"), "memory")
    assert "MiB" in refusal(lambda: vm(memory="16.0001M"), "memory")


@pytest.mark.parametrize(
    ("cpus", "taken"), [(1, True), (255, True), (0, False), (256, False), (-1, False), ("x", False)]
)
def test_cpus(cpus, taken):
    if taken:
        assert vm(cpus=cpus).cpus == cpus
    else:
        refusal(lambda: vm(cpus=cpus), "cpus")


def test_a_misspelt_field_is_an_error():
    assert "not permitted" in refusal(lambda: vm(memroy="1G"), "memroy")
    refusal(lambda: vm(disks=[{"size": "1G", "bsu": "x"}]), "disks", "0", "bsu")
    refusal(
        lambda: vm(nics=[{"publish": [{"host": 1, "guest": 1, "proto": "udp"}]}]), "nics", "0", "publish", "0", "proto"
    )


def test_specs_do_not_change():
    with pytest.raises(ValidationError):
        vm().cpus = 3


# --- disks ---


def test_disks():
    assert vm(disks=[{}]).disks[0].size is None, "the image's own size"
    assert len(vm(disks=[{"size": "1M"}] * 24).disks) == 24
    refusal(lambda: vm(disks=[{"size": "1G"}] * 25), "disks")
    refusal(lambda: vm(disks=[{"size": "1023K"}]), "disks", "0", "size")
    refusal(lambda: vm(disks=[{"size": "65T"}]), "disks", "0", "size")
    refusal(lambda: vm(disks=[{"size": "1G", "bus": "ide"}]), "disks", "0", "bus")
    assert "disk 1" in refusal(lambda: vm(disks=[{}, {}]))
    assert "disk 0" in refusal(lambda: vm(image=None, iso="/a.iso", disks=[{}]))


@pytest.mark.parametrize("serial", ["", "a", "x" * 20, 'a,b="c"', " ", "{}\\'%s"])
def test_serials(serial):
    assert vm(disks=[{"serial": serial}]).disks[0].serial == serial


@pytest.mark.parametrize("serial", ["x" * 21, "é", "a\nb", "\0", "\x7f", "☃" * 7])
def test_no_serials(serial):
    refusal(lambda: vm(disks=[{"serial": serial}]), "disks", "0", "serial")


# --- NICs ---


@pytest.mark.parametrize("mac", ["52:54:00:12:34:56", "52-54-00-AB-CD-EF", "02:00:00:00:00:00"])
def test_macs(mac):
    assert NicSpec(mac=mac).mac == mac.lower().replace("-", ":")


@pytest.mark.parametrize(
    "mac",
    ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "525400123456", "52:54:00:12:34:5g", "01:00:5e:00:00:01",
     "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "52:54:00:12:34:56,x=y", "52:54:00:12:34:56\n", "５2:54:00:12:34:56"],
)  # fmt: skip
def test_no_macs(mac):
    refusal(lambda: NicSpec(mac=mac), "mac")


def test_two_nics_of_one_address():
    nics = [{"mac": "52:54:00:00:00:01"}, {"mac": "52-54-00-00-00-01"}]
    assert "same MAC" in refusal(lambda: vm(nics=nics))
    refusal(lambda: vm(nics=[{}] * 9), "nics")


@pytest.mark.parametrize(
    "address", ["", ":::1", "localhost", "127.1", "1.2.3.4.5", "127.0.0.1,x", "127.0.0.1-:22", "010.0.0.1"]
)
def test_no_addresses(address):
    assert "IPv4" in refusal(lambda: PortForward(host=1, guest=1, address=address), "address")


def test_a_port_is_published_once():
    def publish(*forwards):
        return vm(
            nics=[{"publish": [dict(zip(("host", "guest", "protocol", "address"), f, strict=True))]} for f in forwards]
        )

    one = (80, 80, "tcp", "127.0.0.1")
    publish(one, (80, 81, "udp", "127.0.0.1"), (80, 80, "tcp", "127.0.0.2"), (81, 80, "tcp", "127.0.0.1"))
    for other in (one, (80, 81, "tcp", "127.0.0.1"), (80, 81, "tcp", "0.0.0.0")):
        assert "80/tcp" in refusal(lambda other=other: publish(one, other))
        assert "80/tcp" in refusal(lambda other=other: publish(other, one))
    nat = {"mode": "network", "network": "lab"}
    for one, other, clash in (
        ("::", "::", True),
        ("::", "127.0.0.1", True),
        ("2001:db8::1", "::", True),
        ("::", "0.0.0.0", True),
        ("2001:db8::1", "0.0.0.0", False),
        ("2001:db8::1", "127.0.0.1", False),
    ):
        nic = nat | {"publish": [{"host": 80, "guest": 80, "address": address} for address in (one, other)]}
        if clash:
            assert "80/tcp" in refusal(lambda nic=nic: vm(nics=[nic]))
        else:
            vm(nics=[nic])
    nic = nat | {"publish": [{"host": 80, "guest": 80, "address": "::1"}]}
    assert "127.0.0.1" in refusal(lambda: vm(nics=[nic]), "nics", "0")
    assert "IPv4 only" in refusal(lambda: NicSpec(publish=(PortForward(host=80, guest=80, address="::"),)))
    for bad in (0, 65536, -1):
        refusal(lambda bad=bad: PortForward(host=bad, guest=1), "host")
        refusal(lambda bad=bad: PortForward(host=1, guest=bad), "guest")


# --- booting ---


def test_something_to_boot_from():
    assert "boot from" in refusal(lambda: vm(image=None, disks=[]))
    assert vm(image=None).disks, "an empty disk"
    assert vm(image=None, iso="/a.iso", disks=[]).iso
    for bad in ("a.iso", "", "/a\0b", "~/a.iso"):
        refusal(lambda bad=bad: vm(iso=bad), "iso")
    assert vm(iso="/srv/a, b\n.iso").iso == "/srv/a, b\n.iso"
    refusal(lambda: vm(firmware="openfirmware"), "firmware")


@pytest.mark.parametrize("key", [KEY, KEY + " me@host", f" {KEY} x y z\n", "ecdsa-sha2-nistp256 AAAA é"])
def test_keys(key):
    assert FirstBoot(ssh_keys=(key,)).ssh_keys == (key.strip(),)


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", KEY + "\n" + KEY, KEY + "\r" + KEY, KEY + " \0", KEY + "\u2028x", "/a b"]
)
def test_no_keys(key):
    assert "public key" in refusal(lambda: FirstBoot(ssh_keys=(key,)), "ssh_keys")


def test_environment():
    assert FirstBoot(env={"A_1": "x=y 'z'"}).env == {"A_1": "x=y 'z'"}
    for name in ("", "1A", "A-B", "A=B", "A B", "É", "A\n", "A" * 129):
        refusal(lambda name=name: FirstBoot(env={name: "x"}), "env")
    for value in ("a\nb", "a\0b", "x" * 32769):
        message = refusal(lambda value=value: FirstBoot(env={"SECRET": value}), "env")
        assert "SECRET" in message and value not in message
    refusal(lambda: FirstBoot(env={f"A{n}": "x" for n in range(257)}), "env")


def test_user_and_seed():
    for user in ("", "Root", "a b", "-a", "a" * 33, "a:b"):
        refusal(lambda user=user: FirstBoot(user=user), "user")
    for field in ("user_data", "network_config", "ignition"):
        assert getattr(FirstBoot(**{field: "x" * MAX_SEED}), field)
        refusal(lambda field=field: FirstBoot(**{field: "x" * (MAX_SEED + 1)}), field)


# --- requests and manifests ---


def test_requests():
    digest = "a" * 64
    assert PullRequest(url="https://a/b", sha256=digest, name="x").format is None
    for url in ("ftp://a/b", "file:///etc/shadow", "https://a b", "https://a\nb", "nbd://a", ""):
        refusal(lambda url=url: PullRequest(url=url, sha256=digest, name="x"), "url")
    for bad in ("", "a" * 63, "g" * 64, digest + "\n"):
        refusal(lambda bad=bad: PullRequest(url="https://a/b", sha256=bad, name="x"), "sha256")
    for path in ("a", "", "/a\0"):
        refusal(lambda path=path: ImportRequest(path=path, name="x"), "path")
    refusal(lambda: ImportRequest(path="/a", name="x", format="iso"), "format")
    for recipe in ("../x", "/x", "X", ""):
        refusal(lambda recipe=recipe: BuildRequest(recipe=recipe), "recipe")


def test_manifests():
    adapter = TypeAdapter(Manifest)
    made = adapter.validate_python({"kind": "vm", "name": "a", "image": "x", "state": "stopped"})
    assert isinstance(made, VMManifest) and made.spec() == vm(name="a", image="x")
    assert isinstance(adapter.validate_python({"kind": "image", "name": "a", "recipe": "tiny"}), ImageManifest)
    for bad in (
        {"name": "a"},
        {"kind": "pod", "name": "a"},
        {"kind": "vm", "name": "a", "image": "x", "state": "paused"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


SIZES = st.integers(1 << 20, 64 << 40)
SPECS = st.builds(
    lambda **fields: vm(**fields),
    name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    cpus=st.integers(1, 255),
    memory=st.integers(16, 16 << 20).map(lambda mib: mib << 20),
    disks=st.lists(
        st.fixed_dictionaries({"size": SIZES, "serial": st.from_regex(r"[ -~]{0,20}", fullmatch=True)}), max_size=4
    ),
    nics=st.lists(st.fixed_dictionaries({"model": st.sampled_from(["virtio", "e1000e"])}), max_size=4),
    note=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
)


@settings(max_examples=100, deadline=None)
@given(spec=SPECS)
def test_a_spec_survives_the_store_and_the_api(spec):
    assert VMSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert VMSpec.model_validate_json(spec.model_dump_json()) == spec


@settings(max_examples=300, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    field=st.sampled_from(sorted(VMSpec.model_fields)),
)
def test_anything_at_all_is_taken_or_refused_by_name(value, field):
    """No other exception: the API turns a ValidationError into 422, and everything else would be a 500."""
    try:
        VMSpec.model_validate({"name": "web", "image": "debian-12", field: value})
    except ValidationError as error:
        assert all(problem["loc"][:1] in ((field,), ()) for problem in error.errors())


@pytest.mark.parametrize(
    ("written", "bits", "said"),
    [
        ("100mbit", 10**8, "100mbit"),
        ("1.5mbit", 1_500_000, "1500kbit"),
        ("64kbit", 64_000, "64kbit"),
        ("2.5 Gbit", 2_500_000_000, "2500mbit"),
        ("1000001", 1_000_001, "1000001bit"),
        (10**9, 10**9, "1gbit"),
    ],
)
def test_rates(written, bits, said):
    nic = NicSpec(mode="network", network="lab", limit=written)
    assert nic.limit == bits and format_rate(bits) == said


@pytest.mark.parametrize("written", ["", "fast", "100MB", "100mbps", "-1mbit", "63kbit", "33gbit", True, 0])
def test_no_rates(written):
    refusal(lambda: NicSpec(mode="network", network="lab", limit=written), "limit")


def test_limits_and_links_are_of_cards_that_can_have_them():
    assert "takes no limit" in refusal(lambda: NicSpec(limit="1mbit"))
    assert "no cable" in refusal(lambda: NicSpec(mode="none", link="down"))
    assert NicSpec(link="down").link == "down"
