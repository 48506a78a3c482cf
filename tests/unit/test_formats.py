"""Image headers: real ones by qemu-img are read right, hostile ones are refused before any tool opens the file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from innkeeper.base.errors import ImageFormatUnknown, ImageUnsafe, InnkeeperError, InvalidInput, NotFound
from innkeeper.storage.formats import inspect, qcow2, vhdx
from innkeeper.storage.formats.header import MAX_VIRTUAL_SIZE, READ_BUDGET, Reader

SIZE = 10 << 20

REAL = {
    "v3.qcow2": ("qcow2", ""),
    "v2.qcow2": ("qcow2", "compat=0.10"),
    "small.qcow2": ("qcow2", "cluster_size=512"),
    "large.qcow2": ("qcow2", "cluster_size=2M,refcount_bits=64"),
    "zstd.qcow2": ("qcow2", "compression_type=zstd"),
    "extl2.qcow2": ("qcow2", "extended_l2=on,lazy_refcounts=on"),
    "sparse.vmdk": ("vmdk", "subformat=monolithicSparse"),
    "v6.vmdk": ("vmdk", "subformat=monolithicSparse,compat6,zeroed_grain=on"),
    "stream.vmdk": ("vmdk", "subformat=streamOptimized"),
    "dynamic.vdi": ("vdi", ""),
    "fixed.vdi": ("vdi", "static=on"),
    "dynamic.vhdx": ("vhdx", "subformat=dynamic"),
    "fixed.vhdx": ("vhdx", "subformat=fixed,block_size=1M"),
    "dynamic.vhd": ("vpc", "subformat=dynamic"),
    "fixed.vhd": ("vpc", "subformat=fixed"),
    "exact.vhd": ("vpc", "subformat=dynamic,force_size=on"),
    "disk.raw": ("raw", ""),
}


def qemu_img(*words: str | os.PathLike[str]) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


def create(path: Path, kind: str, options: str = "") -> Path:
    qemu_img("create", "-q", "-f", kind, *(["-o", options] if options else []), path, str(SIZE))
    return path


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one image of every kind that is accepted."""
    folder = tmp_path_factory.mktemp("real")
    for name, (kind, options) in REAL.items():
        create(folder / name, kind, options)
    return folder


@pytest.fixture
def image(real: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a real image, with bytes replaced at offsets."""

    def patched(name: str, *patches: tuple[int, bytes]) -> Path:
        data = bytearray((real / name).read_bytes())
        for offset, new in patches:
            if offset < 0:
                offset += len(data)
            data[offset : offset + len(new)] = new
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return patched


@pytest.mark.parametrize("name", REAL)
def test_real_images_are_read_as_qemu_reads_them(real: Path, name: str) -> None:
    kind = REAL[name][0]
    header = inspect(real / name)
    seen = json.loads(qemu_img("info", "--output=json", "-f", kind, real / name))
    assert header.format == kind
    assert header.virtual_size == seen["virtual-size"]
    assert inspect(real / name, kind) == header
    if kind not in ("raw", "vpc", "vhdx"):
        assert header.facts["cluster_size"] == seen["cluster-size"]
    if kind == "qcow2":
        data = seen["format-specific"]["data"]
        assert header.facts["compression"] == data.get("compression-type", "zlib")
        assert header.facts["refcount_bits"] == data["refcount-bits"]
        assert header.facts["extended_l2"] == data.get("extended-l2", False)
        assert header.facts["lazy_refcounts"] == data.get("lazy-refcounts", False)
        assert header.facts["version"] == {"0.10": 2, "1.1": 3}[data["compat"]]
    if kind == "vmdk":
        assert header.facts["subformat"] == seen["format-specific"]["data"]["create-type"]


def test_internal_snapshots_are_counted(real: Path, image: Callable[..., Path]) -> None:
    path = image("v3.qcow2")
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("snapshot", "-c", "two", path)
    assert inspect(path).facts["snapshots"] == 2


def test_bitmaps_are_seen(image: Callable[..., Path]) -> None:
    path = image("v3.qcow2")
    qemu_img("bitmap", "--add", path, "b0")
    assert inspect(path).facts["bitmaps"] is True


# --- references to other files, made by qemu-img itself --------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "other.img",
        "../../etc/hostname",
        'json:{"driver":"null-co"}',
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/x",
    ],
)
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_qcow2_backing_file(tmp_path: Path, name: str, version: str) -> None:
    path = tmp_path / "overlay.qcow2"
    qemu_img(
        "create", "-q", "-u", "-f", "qcow2", "-o", f"compat={version}", "-b", name, "-F", "raw", path, "1M"
    )  # fmt: skip
    with pytest.raises(ImageUnsafe) as caught:
        inspect(path)
    assert name in caught.value.detail.replace("\\", "")
    assert "convert" in caught.value.hint


@pytest.mark.parametrize("raw", ["on", "off"])
def test_qcow2_external_data_file(tmp_path: Path, raw: str) -> None:
    data, path = tmp_path / "data.raw", tmp_path / "x.qcow2"
    create(path, "qcow2", f"data_file={data},data_file_raw={raw}")
    with pytest.raises(ImageUnsafe, match="data in another file"):
        inspect(path)
    # the name alone, in its extension, without the bits
    blob = bytearray(path.read_bytes())
    blob[72:96] = bytes(24)
    path.write_bytes(blob)
    with pytest.raises(ImageUnsafe, match=r"data in another file, '.*data\.raw'"):
        inspect(path)


@pytest.mark.parametrize("cipher", ["aes", "luks"])
def test_qcow2_encryption(tmp_path: Path, cipher: str) -> None:
    path = tmp_path / "x.qcow2"
    options = f"encrypt.format={cipher},encrypt.key-secret=s" + (",encrypt.iter-time=10" if cipher == "luks" else "")
    qemu_img("create", "-q", "--object", "secret,id=s,data=pw", "-f", "qcow2", "-o", options, path, "1M")
    with pytest.raises(ImageUnsafe, match="encrypted"):
        inspect(path)


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_vmdk_that_names_other_files(tmp_path: Path, kind: str) -> None:
    path = create(tmp_path / "disk.vmdk", "vmdk", f"subformat={kind}")
    with pytest.raises(ImageUnsafe, match=f"description of a VMDK disk .{kind}.; its data is in 'disk-") as caught:
        inspect(path)
    assert "qemu-img convert" in caught.value.hint
    assert ("import 'disk-flat.vmdk' as raw" in caught.value.hint) == (kind == "monolithicFlat")


def test_vmdk_one_part_of_a_split_disk(tmp_path: Path) -> None:
    create(tmp_path / "disk.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse")
    with pytest.raises(ImageUnsafe, match="not one file"):
        inspect(tmp_path / "disk-s001.vmdk")


def test_vmdk_linked_clone(tmp_path: Path) -> None:
    parent, path = create(tmp_path / "parent.vmdk", "vmdk"), tmp_path / "child.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", path)
    with pytest.raises(ImageUnsafe, match="stands on another one"):
        inspect(path)


DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="{kind}"

# Extent description
RW 20480 {extent} "{name}"{rest}
"""


@pytest.mark.parametrize("name", ["/etc/shadow", "../secret", "/dev/sda", "json:{}", "nbd://h/x", "a.vmdk"])
@pytest.mark.parametrize(
    ("kind", "extent", "rest"),
    [
        ("monolithicFlat", "FLAT", " 0"),
        ("twoGbMaxExtentFlat", "FLAT", " 0"),
        ("twoGbMaxExtentSparse", "SPARSE", ""),
        ("vmfs", "VMFS", ""),
        ("vmfsSparse", "VMFSSPARSE", ""),
        ("vmfsRDM", "VMFSRDM", ""),
        ("vmfsRawDeviceMap", "VMFSRDM", ""),
        ("vmfsPassthroughRawDeviceMap", "VMFSRDM", ""),
        ("seSparse", "SESPARSE", ""),
        ("fullDevice", "FLAT", " 0"),
        ("partitionedDevice", "FLAT", " 63"),
        ("custom", "FLAT", " 0"),
        ("streamOptimized", "SPARSE", ""),
    ],
)
def test_vmdk_descriptor_files(tmp_path: Path, kind: str, extent: str, rest: str, name: str) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text(DESCRIPTOR.format(kind=kind, extent=extent, name=name, rest=rest))
    for declared in (None, "vmdk"):
        with pytest.raises(ImageUnsafe, match="only the description") as caught:
            inspect(path, declared)
        assert name in caught.value.detail
        assert ("as raw instead" in caught.value.hint) == (name == "a.vmdk" and kind in ("monolithicFlat", "vmfs"))


@pytest.mark.parametrize("start", ["\n\r\n", "# a comment\n", "   \n# Disk DescriptorFile\n", ""])
def test_vmdk_descriptor_is_found_as_qemu_finds_it(tmp_path: Path, start: str) -> None:
    path = tmp_path / "disk.vmdk"
    text = DESCRIPTOR.format(kind="monolithicFlat", extent="FLAT", name="/etc/shadow", rest=" 0")
    path.write_text(start + text.partition("\n")[2])
    with pytest.raises(ImageUnsafe, match="/etc/shadow"):
        inspect(path)


def sparse_descriptor(name: str, extra: str = "", kind: str = "monolithicSparse", extent: str = "SPARSE") -> bytes:
    return (DESCRIPTOR.format(kind=kind, extent=extent, name=name, rest="") + extra).encode().ljust(1500, b"\0")


@pytest.mark.parametrize(
    ("descriptor", "error"),
    [
        (sparse_descriptor("/etc/shadow"), "names another file"),
        (sparse_descriptor("..\\x.vmdk"), "names another file"),
        (sparse_descriptor("nbd:h"), "names another file"),
        (sparse_descriptor("a.vmdk", 'RW 1 SPARSE "b.vmdk"\n'), "names 2 extents"),
        (sparse_descriptor("a.vmdk", 'RW 1 FLAT "/etc/shadow" 0\n'), "names 2 extents"),
        (sparse_descriptor("a.vmdk", extent="FLAT"), "names 1 extents"),
        (sparse_descriptor("a.vmdk", kind="monolithicFlat"), "not one file"),
        (sparse_descriptor("a.vmdk", kind="custom"), "not one file"),
        (sparse_descriptor("a.vmdk", 'parentFileNameHint="/etc/shadow"\n'), "stands on another"),
        (sparse_descriptor("a.vmdk").replace(b"parentCID=ffffffff", b"parentCID=12345678"), "stands on another"),
        (bytes(1500), "not one file"),
    ],
)
def test_vmdk_embedded_descriptor(image: Callable[..., Path], descriptor: bytes, error: str) -> None:
    with pytest.raises(ImageUnsafe, match=error):
        inspect(image("sparse.vmdk", (512, descriptor)))


def test_vmdk_renamed_file_is_accepted(image: Callable[..., Path]) -> None:
    assert inspect(image("sparse.vmdk", (512, sparse_descriptor("old name.vmdk")))).virtual_size == SIZE


def test_vmdk_parent_hint_where_qemu_looks_but_the_header_does_not_say(image: Callable[..., Path]) -> None:
    path = image("sparse.vmdk", (512, sparse_descriptor("a.vmdk", 'parentFileNameHint="/etc/shadow"\n')))
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        good = -(-file.tell() // 512)
        file.seek(good * 512)
        file.write(sparse_descriptor("a.vmdk").ljust(20 * 512, b"\0"))
        file.seek(28)
        file.write(struct.pack("<QQ", good, 20))
    with pytest.raises(ImageUnsafe, match="stands on another"):
        inspect(path)


def test_vmdk_capacity_zero_makes_qemu_open_extents(image: Callable[..., Path]) -> None:
    with pytest.raises(ImageUnsafe, match="capacity 0"):
        inspect(image("sparse.vmdk", (12, bytes(8))))


def test_vmdk_footer_takes_precedence(real: Path, tmp_path: Path) -> None:
    """A stream as VMware writes it: the grain directory is announced in a footer at the end."""
    data = bytearray((real / "stream.vmdk").read_bytes())
    header = bytes(data[:512])
    data[56:64] = b"\xff" * 8
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    path = tmp_path / "s.vmdk"
    path.write_bytes(data + marker + header + bytes(512))
    assert inspect(path).virtual_size == SIZE
    assert json.loads(qemu_img("info", "--output=json", "-f", "vmdk", path))["virtual-size"] == SIZE
    evil = bytearray(header)
    evil[12:20] = struct.pack("<Q", 1 << 60)
    path.write_bytes(data + marker + evil + bytes(512))
    with pytest.raises(ImageUnsafe, match="64 TiB"):
        inspect(path)
    path.write_bytes(data + bytes(512) + header + bytes(512))
    with pytest.raises(ImageUnsafe, match="footer"):
        inspect(path)


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"COWD\1\0\0\0", "vmfsSparse"), (struct.pack("<QQ", 0xCAFEBABE, 0x200000001), "seSparse")]
)
def test_vmdk_extents_of_esx(tmp_path: Path, magic: bytes, kind: str) -> None:
    path = tmp_path / "disk-delta.vmdk"
    path.write_bytes(magic.ljust(1 << 20, b"\0"))
    with pytest.raises(ImageUnsafe, match=kind):
        inspect(path)


# --- headers that lie ------------------------------------------------------------------------------------------


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


QCOW2_LIES = {
    "version 4": [(4, u32(4))],
    "version 0": [(4, u32(0))],
    r"clusters of 2\^8 ": [(20, u32(8))],
    r"clusters of 2\^22 ": [(20, u32(22))],
    r"clusters of 2\^4294967295 ": [(20, u32(0xFFFFFFFF))],
    "no size": [(24, u64(0))],
    "64 TiB": [(24, u64((64 << 40) + 512))],
    "not a multiple of 512": [(24, u64(SIZE - 1))],
    "encrypted": [(32, u32(2))],
    "L1 table has 0 entries": [(36, u32(0))],
    "L1 table claims": [(36, u32(0xFFFFFFFF))],
    "L1 table .* outside": [(40, u64(1 << 40))],
    "L1 table's offset, 196609": [(40, u64(196609))],
    "L1 table's offset, 0": [(40, u64(0))],
    "refcount table .* outside": [(48, u64(1 << 62))],
    "refcount table's offset": [(48, u64(7))],
    "refcount table claims 0": [(56, u32(0))],
    "refcount table claims 4294967295": [(56, u32(0xFFFFFFFF))],
    "claims 4294967295 snapshots": [(60, u32(0xFFFFFFFF))],
    "snapshot table .* outside": [(60, u32(60000)), (64, u64(65536))],
    "snapshot table's offset": [(60, u32(1)), (64, u64(3))],
    "dirty": [(72, u64(1))],
    "corrupt": [(72, u64(2))],
    "external data file": [(72, u64(4))],
    "compression type 0": [(72, u64(8))],
    "compression type 2": [(72, u64(8)), (104, b"\2")],
    "compression type 1": [(104, b"\1")],
    r"incompatible bits 5, 63": [(72, u64(1 << 5 | 1 << 63))],
    "refcounts of 2\\^7": [(96, u32(7))],
    "length of 96": [(100, u32(96))],
    "length of 105": [(100, u32(105))],
    "length of 4294967288": [(100, u32(0xFFFFFFF8))],
    "leaves the first cluster": [(112, u32(0x12345678) + u32(0xFFFFFFF0))],
    "appears twice": [(112, (u32(0x12345678) + u32(0)) * 2)],
    "more than 64 header": [(112, b"".join(u32(n) + u32(0) for n in range(1, 70)))],
    "stands on another file, ''": [(8, u64(1 << 63))],
}


@pytest.mark.parametrize("error", QCOW2_LIES)
def test_qcow2_lies(image: Callable[..., Path], error: str) -> None:
    with pytest.raises(ImageUnsafe, match=error):
        inspect(image("v3.qcow2", *QCOW2_LIES[error]))


def test_qcow2_extended_l2_needs_larger_clusters(image: Callable[..., Path]) -> None:
    with pytest.raises(ImageUnsafe, match="16 KiB"):
        inspect(image("small.qcow2", (72, u64(16))))


def test_old_qcow_is_named(tmp_path: Path) -> None:
    path = create(tmp_path / "old.qcow", "qcow")
    with pytest.raises(ImageFormatUnknown, match="version 1"):
        inspect(path)


LIES = {
    "VDI version 0.2": ("dynamic.vdi", [(68, le(2, 4))]),
    "differencing": ("dynamic.vdi", [(76, le(4, 4))]),
    "out of place": ("dynamic.vdi", [(340, le(7, 4))]),
    "sectors of 4096": ("dynamic.vdi", [(360, le(4096, 4))]),
    "has no size": ("dynamic.vdi", [(368, le(0, 8))]),
    "64 TiB": ("dynamic.vdi", [(368, le(1 << 63, 8))]),
    "do not fit in 10 blocks": ("dynamic.vdi", [(368, le(SIZE + 512, 8))]),
    "blocks of 0 bytes": ("dynamic.vdi", [(376, le(0, 4))]),
    "VDI block map .* outside|out of place": ("dynamic.vdi", [(384, le(0xFFFFFFFF, 4))]),
    "stands on another": ("dynamic.vdi", [(440, b"u" * 16)]),
    "differencing image or snapshot": ("dynamic.vdi", [(424, b"u" * 16)]),
    "VMDK version 4": ("sparse.vmdk", [(4, le(4, 4))]),
    "at most 64 TiB": ("sparse.vmdk", [(12, le(1 << 62, 8))]),
    "grains of 0 sectors": ("sparse.vmdk", [(20, le(0, 8))]),
    "grains of 3 sectors": ("sparse.vmdk", [(20, le(3, 8))]),
    "tables of 513": ("sparse.vmdk", [(44, le(513, 4))]),
    "descriptor claims": ("sparse.vmdk", [(36, le(1 << 50, 8))]),
    "VMDK descriptor .* outside": ("sparse.vmdk", [(28, le(1 << 50, 8))]),
    "grain directory .* outside": ("sparse.vmdk", [(56, le(1 << 40, 8))]),
    "backup grain directory .* outside": ("sparse.vmdk", [(48, le(1 << 40, 8))]),
    "VMDK metadata .* outside": ("sparse.vmdk", [(64, le(1 << 40, 8))]),
    "compression 7": ("sparse.vmdk", [(77, le(7, 2))]),
    "compression 1 contradicts": ("sparse.vmdk", [(77, le(1, 2))]),
    "split VMDK": ("sparse.vmdk", [(28, le(0, 8))]),
    "footer's checksum": ("dynamic.vhd", [(48, b"\1")]),
    "no valid header": ("dynamic.vhdx", [(65536, b"x"), (131072, b"x")]),
    "region table is damaged": ("dynamic.vhdx", [(196608, b"x")]),
    "region .* twice, or nobody": ("dynamic.vhdx", [(196608 + 16, b"x"), (196608 + 44, b"\1")]),
    "lies in the header": ("dynamic.vhdx", [(196608 + 32, bytes(8))]),
}  # fmt: skip


@pytest.mark.parametrize("error", LIES)
def test_lies(image: Callable[..., Path], error: str) -> None:
    name, patches = LIES[error]
    with pytest.raises(ImageUnsafe, match=error):
        inspect(image(name, *patches))


def vhd_sum(block: bytes, at: int) -> bytes:
    clean = block[:at] + bytes(4) + block[at + 4 :]
    return clean[:at] + u32(~sum(clean) & 0xFFFFFFFF) + clean[at + 4 :]


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ((60, u32(4)), "differencing"),
        ((60, u32(2)), "type 2"),
        ((60, u32(9)), "type 9"),
        ((48, u64(0)), "no size"),
        ((48, u64(3 << 40)), "cannot have"),
        ((48, u64(SIZE + 1)), "cannot have"),
        ((16, u64(1 << 62)), "outside"),
        ((16, u64(0)), "dynamic disk header is damaged"),
        ((48, u64(1 << 40)), "do not fit"),
    ],
)
def test_vhd_footer_lies(image: Callable[..., Path], patch: tuple[int, bytes], error: str) -> None:
    path = image("dynamic.vhd", patch)
    data = path.read_bytes()
    path.write_bytes(vhd_sum(data[:512], 64) + data[512:])
    with pytest.raises(ImageUnsafe, match=error):
        inspect(path)


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ((16, u64(1 << 62)), "outside"),
        ((28, u32(0xFFFFFFFF)), "do not fit"),
        ((28, u32(0)), "do not fit"),
        ((32, u32(0)), "power of two"),
        ((32, u32(12345)), "power of two"),
    ],
)
def test_vhd_dynamic_header_lies(image: Callable[..., Path], patch: tuple[int, bytes], error: str) -> None:
    path = image("dynamic.vhd", (512 + patch[0], patch[1]))
    data = path.read_bytes()
    path.write_bytes(data[:512] + vhd_sum(data[512:1536], 36) + data[1536:])
    with pytest.raises(ImageUnsafe, match=error):
        inspect(path)


def test_vhd_of_virtualbox_keeps_its_end(image: Callable[..., Path]) -> None:
    """QEMU by itself would take the geometry; our parser takes the size."""
    path = image("exact.vhd", (28, b"vbox"), (56, u16(300) + b"\4\x11"))
    data = path.read_bytes()
    path.write_bytes(vhd_sum(data[:512], 64) + data[512:])
    assert inspect(path).virtual_size == SIZE


def test_vhdx_log_must_be_empty(real: Path, tmp_path: Path) -> None:
    """Only the current header counts: the valid one with the higher sequence number."""
    data = (real / "dynamic.vhdx").read_bytes()
    path = tmp_path / "x.vhdx"

    def with_log(offset: int, sequence: int, guid: bytes) -> bytes:
        block = bytearray(data[offset : offset + 4096])
        block[4:8] = bytes(4)
        block[8:16] = le(sequence, 8)
        block[48:64] = guid
        block[4:8] = le(vhdx.crc32c(block), 4)
        return bytes(block)

    def write(first: bytes, second: bytes) -> None:
        path.write_bytes(data[:65536] + first + data[69632:131072] + second + data[135168:])

    write(with_log(65536, 7, b"g" * 16), with_log(131072, 8, bytes(16)))
    assert inspect(path).virtual_size == SIZE
    write(with_log(65536, 9, b"g" * 16), with_log(131072, 8, bytes(16)))
    with pytest.raises(ImageUnsafe, match="log must be replayed") as caught:
        inspect(path)
    assert "qemu-img check -r all" in caught.value.hint


def metadata_item(data: bytes, kind: bytes) -> int:
    """Where the value of a VHDX metadata item lies."""
    regions = [struct.unpack_from("<16sQII", data, 196608 + 16 + 32 * n) for n in range(2)]
    start = next(offset for guid, offset, _, _ in regions if guid == vhdx.METADATA.bytes_le)
    entry = data.index(kind, start)
    return start + int(struct.unpack_from("<I", data, entry + 16)[0])


@pytest.mark.parametrize(
    ("item", "at", "value", "error"),
    [
        (vhdx.FILE_PARAMETERS, 4, le(2, 4), "differencing"),
        (vhdx.FILE_PARAMETERS, 0, le(12345, 4), "blocks of 12345"),
        (vhdx.FILE_PARAMETERS, 0, le(0, 4), "blocks of 0"),
        (vhdx.VIRTUAL_SIZE, 0, le(0, 8), "no size"),
        (vhdx.VIRTUAL_SIZE, 0, le(1 << 50, 8), "64 TiB"),
        (vhdx.VIRTUAL_SIZE, 0, le(SIZE + 1, 8), "multiple of 512"),
        (vhdx.VIRTUAL_SIZE, 0, le(60 << 40, 8), "block table"),
        (vhdx.LOGICAL_SECTOR, 0, le(4096, 4), "sectors of 4096"),
    ],
)
def test_vhdx_metadata_lies(real: Path, tmp_path: Path, item: object, at: int, value: bytes, error: str) -> None:
    data = bytearray((real / "dynamic.vhdx").read_bytes())
    where = metadata_item(data, item.bytes_le) + at  # type: ignore[attr-defined]
    data[where : where + len(value)] = value
    path = tmp_path / "x.vhdx"
    path.write_bytes(data)
    with pytest.raises(ImageUnsafe, match=error):
        inspect(path)


def test_vhdx_parent_locator(real: Path, tmp_path: Path) -> None:
    data = bytearray((real / "dynamic.vhdx").read_bytes())
    page83 = data.index(bytes.fromhex("ab12cabee6b22345"))  # the GUID beca12ab-… of the SCSI page
    data[page83 : page83 + 16] = vhdx.PARENT_LOCATOR.bytes_le
    path = tmp_path / "x.vhdx"
    path.write_bytes(data)
    with pytest.raises(ImageUnsafe, match="differencing"):
        inspect(path)


def test_crc32c() -> None:
    assert vhdx.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


# --- raw, and what is no image ---------------------------------------------------------------------------------


def test_declared_raw_is_believed_whatever_it_holds(image: Callable[..., Path], tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", hostile, "1M")
    header = inspect(hostile, "raw")
    assert (header.format, header.virtual_size) == ("raw", -(-hostile.stat().st_size // 512) * 512)


def test_declared_format_must_be_the_real_one(real: Path) -> None:
    with pytest.raises(InvalidInput, match="declared as qcow2, and is vmdk"):
        inspect(real / "sparse.vmdk", "qcow2")
    with pytest.raises(InvalidInput, match="nothing that is known"):
        inspect(real / "disk.raw", "vdi")
    with pytest.raises(InvalidInput, match="'iso' is not known"):
        inspect(real / "disk.raw", "iso")
    assert inspect(real / "fixed.vhd", "vhd").format == "vpc"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"x", "no format that is known"),
        (bytes(512), "no format that is known"),
        (bytes(100_000), "no format that is known"),
        (b"\x1f\x8b" + bytes(131070), "gzip"),
        (b"\xfd7zXZ\0" + bytes(131066), "xz"),
        (bytes(257) + b"ustar" + bytes(131072 - 262), "OVA"),
        (b"PK\x03\x04" + bytes(131068), "zip"),
        (b"<html>" + bytes(131066), "text"),
        (b"QFI\xfb", "outside the file"),
        (b"KDMV", "outside the file"),
        (b"vhdxfile", "outside the file"),
        (b"conectix", "outside the file"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "outside the file"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, error: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises((ImageFormatUnknown, ImageUnsafe), match=error):
        inspect(path)


def test_what_is_no_file(tmp_path: Path, real: Path) -> None:
    fifo, link, folder, empty = (tmp_path / name for name in ("fifo", "link", "folder", "empty"))
    os.mkfifo(fifo)
    link.symlink_to(real / "v3.qcow2")
    folder.mkdir()
    empty.touch()
    for path, error in ((fifo, "not a regular"), (link, "symbolic link"), (folder, "not a regular"), (empty, "empty")):
        with pytest.raises(InvalidInput, match=error):
            inspect(path)
    with pytest.raises(InvalidInput, match="not a regular"):
        inspect(Path("/dev/null"), "raw")
    with pytest.raises(InvalidInput):
        inspect(Path("a\0b"))
    with pytest.raises(NotFound):
        inspect(tmp_path / "absent")


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    os.truncate(path, 1 << 30)
    with path.open("rb") as file:
        reader = Reader(file.fileno(), 1 << 30)
        reader.read(0, READ_BUDGET - 10, "test")
        with pytest.raises(ImageUnsafe, match="too large"):
            reader.read(0, 11, "test")


# --- nothing but our own errors, ever --------------------------------------------------------------------------

MAGICS = [b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"KDMV\1\0\0\0", b"vhdxfile", b"conectix", b"# Disk DescriptorFile\n"]


def survives(path: Path) -> None:
    for declared in (None, "qcow2", "vmdk", "vdi", "vhdx", "vpc", "raw"):
        try:
            header = inspect(path, declared)
        except InnkeeperError as error:
            assert error.detail
        else:
            assert 0 < header.virtual_size <= MAX_VIRTUAL_SIZE


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(magic=st.sampled_from([*MAGICS, b"", bytes(64) + b"\x7f\x10\xda\xbe"]), rest=st.binary(max_size=2048))
def test_random_bytes(tmp_path: Path, magic: bytes, rest: bytes) -> None:
    path = tmp_path / "random"
    path.write_bytes(magic + rest)
    survives(path)


HOT = [(0, 700), (0, 128), (65536, 200), (131072, 200), (196608, 200), (1 << 20, 100), (2 << 20, 400), (3 << 20, 400)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_real_headers(real: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "mutated"
    blob = bytearray((real / data.draw(st.sampled_from(sorted(REAL)))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start, span = data.draw(st.sampled_from(HOT))
        at = start + data.draw(st.integers(0, span))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        if at + len(new) <= len(blob):
            blob[at : at + len(new)] = new
    path.write_bytes(blob[: data.draw(st.one_of(st.just(len(blob)), st.integers(0, len(blob))))])
    survives(path)


# --- what we write ourselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 512, 1 << 20, (1 << 29) - 512, 1 << 29, (1 << 29) + 1, 20 << 30, 64 << 40])
def test_empty_qcow2_is_right(tmp_path: Path, size: int) -> None:
    path = tmp_path / "e.qcow2"
    qcow2.write_empty(path, size)
    rounded = -(-size // 512) * 512
    check = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path))
    assert (check.get("corruptions", 0), check.get("leaks", 0), check["check-errors"]) == (0, 0, 0)
    header = inspect(path)
    assert header.virtual_size == rounded
    assert header.facts["cluster_size"] == 65536 and not header.facts["lazy_refcounts"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 < 64 << 10


@pytest.mark.parametrize("name", ["base.img", "with space, 'quote\" and ünicode:.img", "n" * 200])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_overlay_reads_its_base_and_can_be_written(tmp_path: Path, kind: str, name: str) -> None:
    base, overlay = tmp_path / name, tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", kind, f"file:{base}", "3M")
    node = json.dumps({"driver": kind, "file": {"driver": "file", "filename": str(base)}})
    subprocess.run(["qemu-io", "-c", "write -q -P 7 1M 1M", f"json:{node}"], check=True)
    qcow2.write_overlay(overlay, base, kind, 5 << 20)
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", overlay))
    assert info["backing-filename"] == str(base)
    assert info["backing-filename-format"] == kind
    assert info["virtual-size"] == 5 << 20
    script = ["-c", "read -q -P 7 1M 1M", "-c", "read -q -P 0 2M 3M", "-c", "write -q -P 9 4M 64k", "-c", "flush"]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *script, overlay], capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout
    check = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", overlay))
    assert check.get("corruptions", 0) == check.get("leaks", 0) == check["check-errors"] == 0
    with overlay.open("rb") as file:
        assert qcow2.read_size(file.fileno()) == 5 << 20
    with pytest.raises(ImageUnsafe, match="backing file"):
        inspect(overlay)


def test_writing_fails_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ImageUnsafe):
        qcow2.write_empty(path, 0)
    with pytest.raises(ImageUnsafe):
        qcow2.write_empty(path, (64 << 40) + 1)
    with pytest.raises(InvalidInput, match="not absolute"):
        qcow2.write_overlay(path, Path("base"), "raw", 1 << 20)
    with pytest.raises(InvalidInput, match="longer"):
        qcow2.write_overlay(path, Path("/" + "x" * 1023), "raw", 1 << 20)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        qcow2.write_empty(path, 1 << 20)
    assert path.read_text() == "mine"
