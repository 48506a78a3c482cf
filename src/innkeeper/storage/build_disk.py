"""A bootable disk from a recipe: GPT, GRUB for BIOS and UEFI, an ext4 root at the end, without loop devices or mounts.

    sector 0        protective MBR with GRUB's boot.img
    1 MiB           partition 14  BIOS boot: GRUB's core.img
    2 MiB           partition 15  EFI system partition: shim and GRUB, both signed by Debian, so secure boot can come
    2 MiB + ESP     partition 1   ext4 root; the last on the disk, so that it can grow

mmdebstrap makes the root, and its last hook (`build_root.sh`) writes the file system straight into the disk file,
where users are what they are meant to be, as root and in a user namespace.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shlex
import struct
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from innkeeper.base.errors import ToolFailed
from innkeeper.base.units import MIB
from innkeeper.spec.recipe import Recipe
from innkeeper.storage.build_packages import Report, install
from innkeeper.storage.cage import Limits, run_tool

SECTOR = 512
CORE_AT = 1 * MIB
ESP_AT = 2 * MIB
QUICK = Limits(seconds=300)
ROOT_HOOK = Path(__file__).with_name("build_root.sh")


async def build_disk(
    recipe: Recipe, workspace: Path, *, job: str, report: Report, convert_report: Report
) -> tuple[dict[str, str], int]:
    """Make `disk.qcow2` in `workspace`. Returns package versions and the disk's size in bytes."""
    assert recipe.disk is not None
    root_uuid, esp_serial = str(uuid.uuid4()), secrets.token_hex(4).upper()
    root_at = ESP_AT + recipe.disk.esp
    disk, files = workspace / "disk.raw", workspace / "boot.tar"

    def tar_in(name: str, content: Mapping[str, str | bytes]) -> str:
        _write_tar(workspace / name, content)
        return f"tar-in {shlex.quote(str(workspace / name))} /"

    early = tar_in("early.tar", early_files(recipe, root_uuid, esp_serial))
    late = tar_in("late.tar", late_files(recipe, root_uuid))
    blocks: list[int] = []
    fds: list[int] = []
    try:
        for path in (disk, files):
            fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            # In a user namespace the root's root is another uid; nobody else gets into the workspace.
            os.fchmod(fds[-1], 0o666)
        settings = {
            "DISK_FD": fds[0],
            "FILES_FD": fds[1],
            "OFFSET": root_at,
            "FREE": recipe.disk.free,
            "UUID": root_uuid,
        }
        # A file, because mmdebstrap repeats a failing hook's whole text after its error.
        script = workspace / "root.sh"
        script.write_text("".join(f"{name}={value}\n" for name, value in settings.items()) + ROOT_HOOK.read_text())
        packages = await install(
            recipe,
            essential_hooks=[early],
            customize_hooks=[late, f'sh {shlex.quote(str(script))} "$1"'],
            workspace=workspace,
            job=job,
            report=report,
            pass_fds=fds,
            on_line=lambda line: blocks.extend(int(n) for n in re.findall(r"^blocks (\d+)$", line)),
        )
    finally:
        for fd in fds:
            os.close(fd)
    if len(blocks) != 1:
        raise ToolFailed("mmdebstrap ended without making the root file system", program="mmdebstrap")

    convert_report(0.0, "partitioning")
    root_size = blocks[0] * 4096
    size = root_at + root_size + MIB  # room for the second GPT
    os.truncate(disk, size)
    boot = _read_tar(files)
    await _partition(disk, root_at, root_size, job)
    esp = workspace / "esp.img"
    await _make_esp(esp, recipe.disk.esp, esp_serial, esp_files(boot, root_uuid), workspace, job)
    with disk.open("r+b") as file:
        install_grub_bios(file, boot["boot.img"], boot["core.img"])
        file.seek(ESP_AT)
        file.write(esp.read_bytes())

    def converting(line: str) -> None:
        if match := re.search(r"\((\d+\.\d+)/100%\)", line):
            convert_report(float(match[1]) / 100, "writing the disk image")

    await run_tool(
        ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", disk, workspace / "disk.qcow2"],
        limits=Limits(seconds=1800),
        on_line=converting,
        job=job,
    )
    return packages, size


def install_grub_bios(disk: io.BufferedRandom, boot_image: bytes, core: bytes) -> None:
    """Put GRUB into the MBR and the BIOS boot partition, as grub-bios-setup does (GRUB 2.06, util/setup.c).

    boot.img (grub-core/boot/i386/pc/boot.S, include/grub/i386/pc/boot.h):
      0x003-0x05a  BIOS parameter block: left as it is on the disk
      0x05c        u64: sector of core.img
      0x064        u8:  boot drive; 0xff = the one the BIOS names
      0x066        u16: drive check; two NOPs let it correct a BIOS that names a wrong hard disk
      0x1b8-0x1fe  disk signature and partition table: left as they are
    core.img begins with diskboot.img, whose last 12 bytes are its first block list entry:
      0x1f4        u64: first sector after this one; u16: how many sectors; u16: segment to load at (0x820)
    """
    mbr = bytearray(SECTOR)
    disk.seek(0)
    disk.readinto(mbr)
    boot = bytearray(boot_image)
    boot[0x03:0x5A], boot[0x1B8:0x1FE] = mbr[0x03:0x5A], mbr[0x1B8:0x1FE]
    first = CORE_AT // SECTOR
    struct.pack_into("<Q", boot, 0x5C, first)
    boot[0x64], boot[0x66:0x68] = 0xFF, b"\x90\x90"

    sectors = -(-len(core) // SECTOR)
    room = (ESP_AT - CORE_AT) // SECTOR
    if len(boot) != SECTOR or boot[0x1FE:] != b"\x55\xaa" or not 2 <= sectors <= room:
        raise ToolFailed(f"boot.img has {len(boot)} and core.img {len(core)} bytes: not GRUB for BIOS")
    patched = bytearray(core)
    struct.pack_into("<QHH", patched, SECTOR - 12, first + 1, sectors - 1, 0x820)
    disk.seek(CORE_AT)
    disk.write(patched)
    disk.seek(0)
    disk.write(boot)


def early_files(recipe: Recipe, root_uuid: str, esp_serial: str) -> dict[str, str | bytes]:
    """What must be in the root before the kernel's package makes its initramfs. A `->` begins a link's target."""
    assert recipe.disk is not None
    serial = f"{esp_serial[:4]}-{esp_serial[4:]}"
    found: dict[str, str | bytes] = {}
    if folder := recipe.files_folder:
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return found | {
        "etc/fstab": f"UUID={root_uuid} / ext4 rw,discard,errors=remount-ro 0 1\n"
        f"UUID={serial} /boot/efi vfat umask=0077,nofail 0 0\n",
        "etc/initramfs-tools/hooks/innkeeper": "#!/bin/sh\n"
        '[ "$1" = prereqs ] && exit 0\n'
        ". /usr/share/initramfs-tools/hook-functions\n"
        f"manual_add_modules {' '.join(recipe.disk.modules)}\n",
        **{f"etc/systemd/system/{unit}": "->/dev/null" for unit in recipe.disk.mask},
    }


def late_files(recipe: Recipe, root_uuid: str) -> dict[str, str | bytes]:
    """What must not be there while packages are installed: update-grub cannot run in a chroot.

    The first grub.cfg boots through the links that Debian keeps at the newest kernel; update-grub in the guest
    replaces it. `enable_cloud` makes grub-cloud-amd64 put new versions of GRUB on the disk.
    """
    script = recipe.script_file
    return {
        "innkeeper-early.cfg": _find_root(root_uuid),
        **({"innkeeper-setup": script.read_bytes()} if script else {}),
        "etc/grub.d/enable_cloud": "",
        "boot/grub/grub.cfg": f"""\
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=0
search --no-floppy --fs-uuid --set=root {root_uuid}
menuentry "Debian" {{
    linux /vmlinuz root=UUID={root_uuid} ro {recipe.cmdline}
    initrd /initrd.img
}}
""",
    }


def esp_files(boot: Mapping[str, bytes], root_uuid: str) -> dict[str, bytes]:
    """shim starts `grubx64.efi` beside it; Debian's signed GRUB reads `/EFI/debian/grub.cfg`."""
    shim, grub, mok = (boot[f"{name}.efi.signed"] for name in ("shimx64", "grubx64", "mmx64"))
    return {
        "EFI/BOOT/BOOTX64.EFI": shim,
        "EFI/BOOT/grubx64.efi": grub,
        "EFI/BOOT/mmx64.efi": mok,
        "EFI/debian/shimx64.efi": shim,
        "EFI/debian/grubx64.efi": grub,
        "EFI/debian/mmx64.efi": mok,
        "EFI/debian/grub.cfg": f"{_find_root(root_uuid)}configfile $prefix/grub.cfg\n".encode(),
    }


def _find_root(root_uuid: str) -> str:
    return f"search.fs_uuid {root_uuid} root\nset prefix=($root)/boot/grub\n"


async def _partition(disk: Path, root_at: int, root_size: int, job: str) -> None:
    table = "label: gpt\n" + "".join(
        f"{number}: start={start // SECTOR}, size={size // SECTOR}, type={kind}, name={name}\n"
        for number, start, size, kind, name in (
            (1, root_at, root_size, "0FC63DAF-8483-4772-8E79-3D69D8477DE4", "root"),
            (14, CORE_AT, ESP_AT - CORE_AT, "21686148-6449-6E6F-744E-656564454649", "bios"),
            (15, ESP_AT, root_at - ESP_AT, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "esp"),
        )
    )
    await run_tool(
        ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk],
        stdin=table.encode(),
        limits=QUICK,
        job=job,
    )


async def _make_esp(image: Path, size: int, serial: str, files: Mapping[str, bytes], workspace: Path, job: str) -> None:
    async def mtool(*argv: str | Path) -> None:
        await run_tool(argv, limits=QUICK, job=job, env={"MTOOLS_SKIP_CHECK": "1", "HOME": str(workspace)})

    with image.open("wb") as file:
        file.truncate(size)
    sectors = str(size // SECTOR)
    await mtool("mformat", "-i", image, "-T", sectors, "-h", "255", "-s", "63", "-v", "ESP", "-N", serial, "::")
    folder = workspace / "esp"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    await mtool("mcopy", "-i", image, "-s", folder / "EFI", "::/EFI")


def _write_tar(path: Path, content: Mapping[str, str | bytes]) -> None:
    """Files owned by root at time 0; one that begins with `#!` is executable. Parent folders come before them."""
    with tarfile.open(path, "w") as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(f"./{name}")
            if isinstance(value, str) and value.startswith("->"):
                member.type, member.linkname = tarfile.SYMTYPE, value.removeprefix("->")
                archive.addfile(member)
                continue
            data = value.encode() if isinstance(value, str) else value
            member.size, member.mode = len(data), 0o755 if data.startswith(b"#!") else 0o644
            archive.addfile(member, io.BytesIO(data))


def _read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {
            Path(member.name).name: file.read()
            for member in archive
            if member.isfile() and (file := archive.extractfile(member))
        }
