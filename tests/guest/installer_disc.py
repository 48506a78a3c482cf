"""A Debian installer disc with an answer file, as administrators make them: the netboot installer of Debian's package
debian-installer-13-netboot-amd64, GRUB, and a preseed in its initrd (debian-installer's guide, appendix B).

Everything comes from the mirror of the host's own apt, and the installed system does too. Mirrors that are caches were
seen to lack installer components (udebs) that are built from the same sources as regular packages: kernel modules and
mke2fs. So the disc carries these, from the regular packages.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from innkeeper.storage.build_packages import INDEX_FORMAT, keyring, sources

SUITE, RELEASE = "trixie", 13
IMAGES = f"usr/lib/debian-installer/images/{RELEASE}/amd64/text/debian-installer/amd64"
COMPONENTS = (
    "base-installer", "bootstrap-base", "finish-install", "disk-detect", "partman-auto", "grub-installer",
    "apt-mirror-setup", "pkgsel", "user-setup-udeb", "tzsetup-udeb", "clock-setup",
)  # fmt: skip
"""What the installer loads from the mirror, besides what these need."""
MODULES = ("virtio_blk", "ext4", "mbcache", "jbd2", "crc16", "crc32c_generic", "dm-mod")
PROGRAMS = ("e2fsprogs", "libext2fs2t64", "libcom-err2", "libss2")
TOOLS = ("grub-mkrescue", "xorriso", "cpio", "dpkg-deb")

PRESEED = """\
d-i preseed/early_command string depmod -a; modprobe virtio_blk; modprobe ext4
d-i debian-installer/language string C
d-i debian-installer/country string US
d-i debian-installer/locale string C.UTF-8
d-i keyboard-configuration/xkb-keymap select us
d-i netcfg/choose_interface select auto
d-i netcfg/get_hostname string {hostname}
d-i netcfg/get_domain string
d-i netcfg/hostname string {hostname}
d-i hw-detect/load_firmware boolean false
d-i mirror/country string manual
d-i mirror/protocol string http
d-i mirror/http/hostname string {mirror}
d-i mirror/http/directory string {directory}
d-i mirror/http/proxy string {proxy}
d-i anna/standard_modules boolean false
d-i anna/choose_modules multiselect {components}
d-i passwd/root-password password {password}
d-i passwd/root-password-again password {password}
d-i passwd/make-user boolean false
d-i clock-setup/utc boolean true
d-i clock-setup/ntp boolean false
d-i time/zone string UTC
d-i partman-auto/disk string /dev/vda
d-i partman-auto/method string regular
d-i partman-auto/expert_recipe string one :: 1000 10000 -1 ext4 $primary{{ }} $bootable{{ }} \
method{{ format }} format{{ }} use_filesystem{{ }} filesystem{{ ext4 }} mountpoint{{ / }} .
d-i partman-basicfilesystems/no_swap boolean false
d-i partman-partitioning/confirm_write_new_label boolean true
d-i partman/choose_partition select finish
d-i partman/confirm boolean true
d-i partman/confirm_nooverwrite boolean true
d-i base-installer/install-recommends boolean false
d-i base-installer/kernel/image string linux-image-cloud-amd64
d-i base-installer/initramfs-tools/driver-policy select dep
d-i apt-setup/services-select multiselect
d-i apt-setup/enable-source-repositories boolean false
tasksel tasksel/first multiselect
d-i pkgsel/run_tasksel boolean false
d-i pkgsel/include string openssh-server qemu-guest-agent
d-i pkgsel/upgrade select none
d-i pkgsel/update-policy select none
popularity-contest popularity-contest/participate boolean false
d-i grub-installer/bootdev string /dev/vda
d-i grub-installer/only_debian boolean true
d-i finish-install/reboot_in_progress note
"""

GRUB = """\
set timeout=2
menuentry 'Install Debian' {
  linux /linux auto=true priority=critical DEBIAN_FRONTEND=text TERM=dumb ipv6.disable=1 \
console=tty0 console=ttyS0,115200 --- console=tty0 console=ttyS0,115200
  initrd /initrd.gz
}
"""
"""What stands after `---` is for the installed system's own command line too."""


def run(*words: str | Path, cwd: Path | None = None, feed: bytes | None = None) -> bytes:
    """Run it; its stdout. An `AssertionError` says what a failed command wrote."""
    done = subprocess.run(words, cwd=cwd, input=feed, capture_output=True)
    assert done.returncode == 0, f"{words[0]}: {done.stderr.decode(errors='replace')[-2000:]}"
    return done.stdout


class Archive:
    """Debian's archive on the host's mirror, for another suite than the host's own: apt with folders of its own, which
    verifies what it downloads as ever. Raises `Unsupported` or `ToolMissing` where that cannot be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        targets = run("apt-get", "indextargets", "--format", INDEX_FORMAT).decode()
        self.address = sources(targets, SUITE)[0].split()[1]
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (folder / name).mkdir(parents=True)
        line = f"deb [signed-by={keyring(SUITE)}] {self.address} {SUITE} main main/debian-installer\n"
        (folder / "sources.list").write_text(line)
        self._apt("apt-get", "update")

    def _apt(self, *words: str) -> str:
        here = {
            "Dir::Etc::sourcelist": self.folder / "sources.list", "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self.folder / "lists", "Dir::Cache": self.folder / "cache",
            "APT::Sandbox::User": "root",
        }  # fmt: skip
        options = [word for key, value in here.items() for word in ("-o", f"{key}={value}")]
        return run(words[0], *options, *words[1:], cwd=self.folder / "debs").decode()

    def unpack(self, packages: Iterable[str], target: Path) -> None:
        """Download packages and unpack them into one folder."""
        self._apt("apt-get", "download", *packages)
        for deb in (self.folder / "debs").iterdir():
            run("dpkg-deb", "-x", deb, target)
            deb.unlink()

    def names(self) -> list[str]:
        """Of all packages."""
        return self._apt("apt-cache", "pkgnames").split()

    def versions(self, packages: Iterable[str]) -> dict[str, str]:
        """Of each, the newest."""
        shown = self._apt("apt-cache", "show", "--no-all-versions", *packages)
        return dict(re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", shown, re.M | re.S))


def proxy() -> str:
    """The HTTP proxy of the host's apt, empty if it has none."""
    found = re.findall(r'^Acquire::http::Proxy "(.*)";$', run("apt-config", "dump").decode(), re.M)
    return found[0] if found else ""


def make_disc(folder: Path, *, hostname: str, password: str) -> Path:
    """The disc, as a file in `folder`, which is for this alone."""
    archive = Archive(folder / "apt")
    mirror = urllib.parse.urlsplit(archive.address)
    assert mirror.scheme == "http", f"the installer is not told how to trust {archive.address}"
    preseed = PRESEED.format(
        hostname=hostname, password=password, mirror=mirror.netloc, directory=mirror.path.rstrip("/"), proxy=proxy(),
        components=", ".join(COMPONENTS),
    )  # fmt: skip
    archive.unpack([f"debian-installer-{RELEASE}-netboot-amd64"], folder / "netboot")
    images = folder / "netboot" / IMAGES
    tree = folder / "tree"
    (tree / "boot/grub").mkdir(parents=True)
    (tree / "boot/grub/grub.cfg").write_text(GRUB)
    shutil.copyfile(images / "linux", tree / "linux")
    initrd = (images / "initrd.gz").read_bytes()
    (tree / "initrd.gz").write_bytes(initrd + gzip.compress(_addition(folder, archive, initrd, preseed), 1))
    run("grub-mkrescue", "-o", folder / "setup.iso", tree)
    return folder / "setup.iso"


def _addition(folder: Path, archive: Archive, initrd: bytes, preseed: str) -> bytes:
    """What is laid over the installer's initrd, as a cpio archive: the kernel unpacks several in a row
    (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    original = folder / "initrd"
    original.mkdir()
    run(
        "cpio", "-id", "--quiet", "var/lib/dpkg/status", "usr/lib/modules/*", cwd=original, feed=gzip.decompress(initrd)
    )
    kernel = next((original / "usr/lib/modules").iterdir()).name
    added, extra = folder / "added", folder / "extra"
    archive.unpack([f"linux-image-{kernel}", *PROGRAMS], extra)

    for file in (extra / "usr/lib/modules").rglob("*.ko*"):
        if file.name.partition(".")[0] in MODULES:
            _copy(file, added / file.relative_to(extra))
    for file in (*(extra / "usr/sbin").iterdir(), *(extra / "usr/lib/x86_64-linux-gnu").iterdir()):
        _copy(file, added / file.relative_to(extra))
    _copy(extra / "etc/mke2fs.conf", added / "etc/mke2fs.conf")

    status = (original / "var/lib/dpkg/status").read_text()
    covered = [name for name in archive.names() if name.endswith(f"-{kernel}-di")] + ["e2fsprogs-udeb", "ntfs-3g-udeb"]
    for name, version in archive.versions(covered).items():  # ntfs-3g: to find other systems, of which there are none
        if f"Package: {name}\n" not in status:
            status += f"\nPackage: {name}\nStatus: install ok installed\nVersion: {version}\n"
            if name.startswith("ext4-modules"):
                status += "Provides: ext2-modules, ext3-modules, ext4-modules\n"
    (added / "var/lib/dpkg").mkdir(parents=True)
    (added / "var/lib/dpkg/status").write_text(status)
    (added / "preseed.cfg").write_text(preseed)
    names = "\0".join(sorted(str(path.relative_to(added)) for path in added.rglob("*")))
    return run("cpio", "-o", "-0", "--quiet", "-H", "newc", "-R", "0:0", cwd=added, feed=names.encode())


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(source, target, follow_symlinks=False)
