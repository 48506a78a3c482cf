"""Import of strangers' images, through real qemu-img in the cage; overlays; checks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from secrets import token_bytes, token_hex

import pytest
from conftest import file_system

from innkeeper.base.errors import ImageUnsafe, InvalidInput, NotFound, PoolFull, ToolFailed
from innkeeper.storage import convert as convert_module
from innkeeper.storage import copy as copy_module
from innkeeper.storage.convert import convert, create_overlay, image_check, room_for, stage
from innkeeper.storage.formats import inspect, qcow2
from innkeeper.storage.room import reserve

NOBODY = 65534 if os.geteuid() == 0 else None
KINDS = {
    "disk.qcow2": ("qcow2", ""),
    "old.qcow2": ("qcow2", "compat=0.10"),
    "zstd.qcow2": ("qcow2", "compression_type=zstd"),
    "sparse.vmdk": ("vmdk", ""),
    "stream.vmdk": ("vmdk", "subformat=streamOptimized"),
    "dynamic.vdi": ("vdi", ""),
    "fixed.vdi": ("vdi", "static=on"),
    "dynamic.vhdx": ("vhdx", ""),
    "fixed.vhdx": ("vhdx", "subformat=fixed"),
    "dynamic.vhd": ("vpc", "force_size=on"),
    "fixed.vhd": ("vpc", "subformat=fixed,force_size=on"),
    "disk.raw": ("raw", ""),
}
SIZE = 12 << 20


def quiet(fraction: float | None, line: str) -> None:
    """No one looks."""


def qemu_img(*words: str | os.PathLike[str]) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of `SIZE` bytes with data in two places."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in (0, 7 << 20):
            file.seek(at)
            file.write(token_bytes(300_000))
    return path


def imported(disk: Path, folder: Path, name: str) -> Path:
    kind, options = KINDS[name]
    qemu_img(
        "convert", "-f", "raw", "-O", kind, *(["-c"] if "zstd" in name else []), *(["-o", options] if options else []),
        disk, folder / name,
    )  # fmt: skip
    return folder / name


def content(image: Path, folder: Path) -> bytes:
    raw = folder / f"{token_hex(4)}.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@pytest.mark.parametrize("name", KINDS)
async def test_every_format_arrives_unchanged(disk: Path, tmp_path: Path, name: str) -> None:
    source = imported(disk, tmp_path, name)
    work = tmp_path / "work"
    work.mkdir(mode=0o700)
    await stage(source, work / "staged", report=quiet)
    header = inspect(work / "staged", KINDS[name][0])
    reports: list[float | None] = []
    await convert(
        work / "staged", header, work / "disk.qcow2", job="op", report=lambda f, _: reports.append(f), user=NOBODY
    )
    made = work / "disk.qcow2"
    assert content(made, tmp_path) == disk.read_bytes()
    assert inspect(made).virtual_size == SIZE
    assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (os.geteuid(), 0o600)
    assert made.stat().st_blocks * 512 < 2 << 20, "holes stay holes"
    assert (await image_check(made)).clean
    assert reports[0] == 0.0 and reports[-1] == 1.0
    assert [f for f in reports if f is not None] == sorted(f for f in reports if f is not None)


async def test_virtualbox_vhd_keeps_its_last_sectors(disk: Path, tmp_path: Path) -> None:
    """QEMU 7.2 by itself would cut it to the CHS geometry."""
    source = imported(disk, tmp_path, "dynamic.vhd")
    blob = bytearray(source.read_bytes())
    blob[28:32] = b"vbox"
    blob[56:60] = bytes([361 >> 8, 361 & 255, 4, 17])  # cylinders, heads, sectors: 14 KiB less than the size
    blob[64:68] = bytes(4)
    blob[64:68] = (~sum(blob[:512]) & 0xFFFFFFFF).to_bytes(4, "big")
    source.write_bytes(blob)
    await convert(source, inspect(source), tmp_path / "made", job="op", report=quiet)
    assert content(tmp_path / "made", tmp_path) == disk.read_bytes()


async def test_raw_that_begins_like_qcow2_stays_raw(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes(token_bytes(65536))
    source = tmp_path / "guest.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-b", canary, "-F", "raw", source)
    os.truncate(source, 1 << 20)
    await convert(source, inspect(source, "raw"), tmp_path / "made", job="op", report=quiet)
    assert content(tmp_path / "made", tmp_path) == source.read_bytes()


def hostile_images(folder: Path, canary: Path) -> list[Path]:
    """Images that make plain qemu-img read the canary."""
    made = []

    def new(name: str) -> Path:
        made.append(folder / name)
        return made[-1]

    qemu_img("create", "-q", "-f", "qcow2", "-b", canary, "-F", "raw", new("absolute.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"../{canary.name}", "-F", "raw", new("relative.qcow2"))
    node = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(canary)}})
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"json:{node}", "-F", "raw", new("json.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'gone'},data_file_raw=on", folder / "d", "64k")
    blob = bytearray((folder / "d").read_bytes())
    old, name = os.fsencode(folder / "gone"), os.fsencode(canary)
    at = blob.index(old) - 4
    rest = blob[at + 4 + -(-len(old) // 8) * 8 : 4096]
    blob[at : at + 4] = len(name).to_bytes(4, "big")
    blob[at + 4 : 4096] = (name.ljust(-(-len(name) // 8) * 8, b"\0") + rest).ljust(4096 - at - 4, b"\0")[
        : 4096 - at - 4
    ]
    new("data-file.qcow2").write_bytes(blob)

    text = (
        '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW 128 FLAT "{canary}" 0\n'
    )
    new("flat.vmdk").write_text(text.ljust(2048))
    new("comment.vmdk").write_text("# hello\n" + text.partition("\n")[2])
    qemu_img("create", "-q", "-f", "vmdk", folder / "s", "64k")
    blob = bytearray((folder / "s").read_bytes())
    blob[12:20] = bytes(8)  # capacity 0
    blob[512 : 512 + 20 * 512] = text.encode().ljust(20 * 512, b"\0")
    new("capacity-0.vmdk").write_bytes(blob)
    return made


async def test_canary(tmp_path: Path) -> None:
    """No hostile image gets a byte of another file into anything that is made."""
    folder, work = tmp_path / "strangers", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    canary = tmp_path / "canary"
    secret = token_bytes(32)
    canary.write_bytes(secret * 2048)
    for source in hostile_images(folder, canary):
        bare = tmp_path / "bare.raw"
        qemu_img("convert", "-f", source.suffix[1:], "-O", "raw", source, bare)
        assert secret in bare.read_bytes(), f"{source.name} is not hostile: the test is wrong"
        bare.unlink()
        staged, target = work / f"{source.name}.staged", work / f"{source.name}.made"
        await stage(source, staged, report=quiet)
        for declared in (None, source.suffix[1:]):
            with pytest.raises(ImageUnsafe):
                await convert(staged, inspect(staged, declared), target, job="op", report=quiet, user=NOBODY)
        await convert(staged, inspect(staged, "raw"), target, job="op", report=quiet, user=NOBODY)
    made = sorted(path for path in work.iterdir())
    assert len(made) == 14
    for path in made:
        assert secret not in path.read_bytes()
        if path.suffix == ".made":
            assert secret not in content(path, tmp_path)


async def test_an_exchanged_image_is_noticed(disk: Path, tmp_path: Path) -> None:
    source = imported(disk, tmp_path, "disk.qcow2")
    header = inspect(source)
    qcow2.write_empty(tmp_path / "other", SIZE * 2)
    (tmp_path / "other").rename(source)
    with pytest.raises(ImageUnsafe, match="changed after"):
        await convert(source, header, tmp_path / "made", job="op", report=quiet)
    source.unlink()
    source.symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="symbolic link"):
        await convert(source, header, tmp_path / "made", job="op", report=quiet)
    assert not (tmp_path / "made").exists()


async def test_source_must_be_private(disk: Path, tmp_path: Path) -> None:
    source = imported(disk, tmp_path, "disk.qcow2")
    source.chmod(0o666)
    with pytest.raises(InvalidInput, match="changed by others"):
        await convert(source, inspect(source), tmp_path / "made", job="op", report=quiet)
    if os.geteuid() == 0:
        source.chmod(0o644)
        os.chown(source, 65534, 65534)
        with pytest.raises(InvalidInput, match="changed by others"):
            await convert(source, inspect(source), tmp_path / "made", job="op", report=quiet)


@pytest.mark.skipif(NOBODY is None, reason="needs root")
async def test_the_tool_may_not_enter_our_folders(disk: Path, tmp_path: Path) -> None:
    """Should qemu-img be taken over, it is a nobody: it works all the same on the two files that it was given."""
    work = tmp_path / "work"
    work.mkdir(mode=0o700)
    source = imported(disk, work, "disk.qcow2")
    source.chmod(0o600)
    with pytest.raises(ToolFailed, match="Permission denied"):
        await image_check(source, user=NOBODY)
    await convert(source, inspect(source), work / "made", job="op", report=quiet, user=NOBODY)
    assert content(work / "made", tmp_path) == disk.read_bytes()


async def test_a_damaged_image_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    source = imported(disk, tmp_path, "stream.vmdk")
    blob = bytearray(source.read_bytes())
    start = len(blob) // 2
    blob[start : start + 4096] = b"\xff" * 4096
    source.write_bytes(blob)
    with pytest.raises(ToolFailed, match="qemu-img"):
        await convert(source, inspect(source), tmp_path / "made", job="op", report=quiet)
    assert not (tmp_path / "made").exists()


def bomb(path: Path, size: int) -> None:
    """A qcow2 in which every guest cluster is the same host cluster of data."""
    qcow2.write_empty(path, size)
    blob = bytearray(path.read_bytes())
    cluster = 65536
    l2, data = len(blob), len(blob) + cluster
    blob[3 * cluster : 3 * cluster + 8] = (l2 | 1 << 63).to_bytes(8, "big")
    blob += (data | 1 << 63).to_bytes(8, "big") * (cluster // 8) + token_bytes(cluster)
    path.write_bytes(blob)


async def test_a_bomb_is_stopped_before_the_pool_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bomb.qcow2"
    bomb(source, 512 << 20)
    assert source.stat().st_size < 1 << 20
    monkeypatch.setattr(convert_module, "room_for", lambda folder: 32 << 20)
    with pytest.raises(PoolFull, match=r"no room for the image .512 MiB at most.; 32 MiB may be used"):
        await convert(source, inspect(source), tmp_path / "made", job="op", report=quiet, user=NOBODY)
    assert not (tmp_path / "made").exists()


async def test_cancel_leaves_neither_file_nor_process(tmp_path: Path) -> None:
    source, job = tmp_path / "bomb.qcow2", token_hex(8)
    bomb(source, 512 << 20)
    started = asyncio.Event()

    def on_progress(fraction: float | None, line: str) -> None:
        if fraction:
            started.set()

    task = asyncio.create_task(
        convert(source, inspect(source), tmp_path / "made", job=job, report=on_progress, user=NOBODY)
    )
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "made").exists()
    mark = f"INNKEEPER_JOB={job}\0".encode()
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert mark not in process.read_bytes()
        except OSError:
            continue


async def test_stage_keeps_holes_and_refuses_what_is_no_file(disk: Path, tmp_path: Path) -> None:
    reports: list[float | None] = []
    await stage(disk, tmp_path / "copy", report=lambda fraction, _: reports.append(fraction))
    await asyncio.sleep(0)
    copy = tmp_path / "copy"
    assert copy.read_bytes() == disk.read_bytes()
    assert copy.stat().st_blocks <= disk.stat().st_blocks
    assert copy.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "fifo")
    for source, error in ((tmp_path / "fifo", InvalidInput), (tmp_path / "absent", NotFound)):
        with pytest.raises(error):
            await stage(source, tmp_path / "other", report=quiet)
    assert not (tmp_path / "other").exists()


async def test_stage_without_room(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "room_for", lambda folder: 1000)
    monkeypatch.setattr(copy_module, "share", lambda source, target: False)
    with pytest.raises(PoolFull):
        await stage(disk, tmp_path / "copy", report=quiet)
    assert not (tmp_path / "copy").exists()


async def test_stage_is_cancelled_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "large"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    monkeypatch.setattr(copy_module, "share", lambda source, target: False)
    monkeypatch.setattr(copy_module, "BLOCK", 4096)
    started = asyncio.Event()
    task = asyncio.create_task(stage(source, tmp_path / "copy", report=lambda *_: started.set()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "copy").exists()


def test_room_leaves_a_reserve(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    assert 0 <= room_for(tmp_path) < state.f_bavail * state.f_frsize


def test_room_is_reserved_in_a_file_that_stays_as_it_is(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(1 << 20)
    reserve(path, 65536)
    assert 65536 <= path.stat().st_blocks * 512 < 1 << 20
    assert path.read_bytes() == b"head".ljust(1 << 20, b"\0")


def test_no_room_is_reserved_in_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("pipe", "link"):
        with pytest.raises(OSError):
            reserve(tmp_path / name, 4096)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.root
def test_room_that_is_not_there_is_said_to_be_missing():
    with file_system("tmpfs", "1M") as pool:
        path = pool / "disk"
        path.write_bytes(b"head")
        with pytest.raises(PoolFull, match="no room for the head of disk"):
            reserve(path, 2 << 20)
        assert path.read_bytes() == b"head"


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
async def test_overlay(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-q", "-f", kind, base, "8M")
    await create_overlay(base, kind, tmp_path / "o1", 8 << 20)
    await create_overlay(tmp_path / "o1", "qcow2", tmp_path / "o2", 20 << 20, durable=False)
    chain = json.loads(qemu_img("info", "--backing-chain", "--output=json", tmp_path / "o2"))
    assert [layer["format"] for layer in chain] == ["qcow2", "qcow2", kind]
    assert [layer["virtual-size"] >> 20 for layer in chain] == [20, 8, 8]
    assert (await image_check(tmp_path / "o2")).clean
    with pytest.raises(InvalidInput, match="smaller than its image of 8 MiB"):
        await create_overlay(base, kind, tmp_path / "o3", (8 << 20) - 512)
    with pytest.raises(InvalidInput, match="cannot stand on a vmdk"):
        await create_overlay(base, "vmdk", tmp_path / "o3", 8 << 20)
    with pytest.raises(NotFound):
        await create_overlay(tmp_path / "absent", kind, tmp_path / "o3", 8 << 20)
    with pytest.raises(FileExistsError):
        await create_overlay(base, kind, tmp_path / "o2", 8 << 20)
    assert not (tmp_path / "o3").exists()


async def test_check_finds_damage_and_leaks(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    bomb(path, 1 << 20)
    report = await image_check(path)
    assert report.corruptions > 0 and not report.clean
    qcow2.write_empty(tmp_path / "leaky", 1 << 20)
    with (tmp_path / "leaky").open("r+b") as file:
        file.seek(2 * 65536 + 8)
        file.write(b"\0\1")
        file.truncate(5 * 65536)
    report = await image_check(tmp_path / "leaky")
    assert (report.corruptions, report.leaks, report.clean) == (0, 1, True)


async def test_check_of_what_is_no_qcow2(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(65536))
    with pytest.raises(ToolFailed, match="not in qcow2 format"):
        await image_check(tmp_path / "x")


async def test_a_header_of_another_image_is_refused(disk: Path, tmp_path: Path) -> None:
    source = imported(disk, tmp_path, "disk.qcow2")
    lie = replace(inspect(source), virtual_size=1 << 20)
    with pytest.raises(ImageUnsafe, match="changed after"):
        await convert(source, lie, tmp_path / "made", job="op", report=quiet)
