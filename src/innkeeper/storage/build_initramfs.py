"""An initramfs from unpacked Debian packages: programs with their shared libraries, kernel modules, our files.

Nothing here needs root or runs guest code: ownership and device nodes exist only in the archive.
"""

from __future__ import annotations

import lzma
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import zstandard

from innkeeper.base.errors import RecipeInvalid, Unsupported

PROGRAM_FOLDERS = ("usr/bin", "usr/sbin", "bin", "sbin")
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib", "usr/lib64", "lib64")


@dataclass(frozen=True)
class Entry:
    """One thing in the archive. `mode` has the type bits; `device` is (major, minor)."""

    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass
class Tree:
    """The root of the guest, by path without a leading slash. Folders appear with what is put into them."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def folder(self, path: str, mode: int = 0o755) -> None:
        self._parents(path)
        self.entries[path] = Entry(stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._put(path, Entry(stat.S_IFREG | mode, content))

    def link(self, path: str, target: str) -> None:
        self._put(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def character_device(self, path: str, major: int, minor: int, mode: int) -> None:
        self._put(path, Entry(stat.S_IFCHR | mode, device=(major, minor)))

    def _put(self, path: str, entry: Entry) -> None:
        self._parents(path)
        self.entries[path] = entry

    def _parents(self, path: str) -> None:
        for parent in reversed(PurePosixPath(path).parents):
            if str(parent) != "." and str(parent) not in self.entries:
                self.entries[str(parent)] = Entry(stat.S_IFDIR | 0o755)


def cpio(entries: dict[str, Entry]) -> Iterator[bytes]:
    """The `newc` format (linux/Documentation/driver-api/early-userspace/buffer-format.rst): a header of 110 ASCII
    bytes, name and content each padded to 4. Owner 0:0 and time 0, so the same input gives the same bytes."""
    everything = [*entries.items(), ("TRAILER!!!", Entry(0))]
    for inode, (path, entry) in enumerate(everything, 1):
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (
            *(inode, entry.mode, 0, 0, links, 0, len(entry.content)),
            *(0, 0, *entry.device, len(name), 0),
        )
        header = b"070701" + b"".join(b"%08X" % value for value in fields)
        yield header + name + b"\0" * (-(len(header) + len(name)) % 4)
        yield entry.content + b"\0" * (-len(entry.content) % 4)


def write_initramfs(tree: Tree, path: Path, compression: str) -> None:
    """Write the archive, as it is or as one zstd frame."""
    with path.open("wb") as file:
        if compression == "zstd":
            with zstandard.ZstdCompressor(level=10, threads=-1).stream_writer(file, closefd=False) as stream:
                for piece in cpio(tree.entries):
                    stream.write(piece)
        else:
            file.writelines(cpio(tree.entries))


def base_tree() -> Tree:
    """Empty mount points, merged /usr, and the console that the kernel opens for pid 1."""
    tree = Tree()
    for path in ("dev", "proc", "sys", "run", "mnt", "etc", "root", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        tree.folder(path)
    tree.folder("tmp", 0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.link(name, f"usr/{name}")
    tree.folder("var")
    tree.link("var/run", "../run")
    tree.link("var/tmp", "../tmp")
    tree.character_device("dev/console", 5, 1, 0o600)
    return tree


def add_overlay(tree: Tree, folder: Path) -> None:
    """The recipe's own files; one that begins with `#!` becomes executable (a wheel does not keep the mode)."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).as_posix()
        if path.is_symlink():
            tree.link(inner, str(path.readlink()))
        elif path.is_file():
            content = path.read_bytes()
            tree.file(inner, content, 0o755 if content.startswith(b"#!") else 0o644)


def add_programs(tree: Tree, root: Path, names: Iterable[str]) -> None:
    """Programs from the unpacked packages, and every shared library they need, under its soname.

    Raises `RecipeInvalid` for a program or a library that no package brought.
    """
    wanted: list[str] = []
    for name in names:
        source = _find(root, PROGRAM_FOLDERS, name)
        if source is None:
            raise RecipeInvalid(f"program {name!r} is in none of the recipe's packages", field="initramfs.programs")
        inner = f"usr/{source.parent.name}/{name}"
        real = _real(root, source)
        if real.name != name and f"usr/{real.parent.name}/{real.name}" in tree.entries:
            tree.link(inner, f"/usr/{real.parent.name}/{real.name}")
            continue
        content = real.read_bytes()
        tree.file(inner, content, 0o755)
        wanted += needed_libraries(content)
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith("/"):  # the loader, by the path that is in the program
            library, inner = _find(root, LIBRARY_FOLDERS, PurePosixPath(name).name), f"usr{name}"
        else:
            library, inner = _find(root, LIBRARY_FOLDERS, name), f"usr/lib/x86_64-linux-gnu/{name}"
        if library is None:
            raise RecipeInvalid(f"library {name!r} is in none of the recipe's packages", field="packages")
        content = _real(root, library).read_bytes()
        tree.file(inner, content, 0o755)
        if not name.startswith("/"):
            wanted += [other for other in needed_libraries(content) if not other.startswith("ld-linux")]
            if b"\0pthread_cancel\0" in content and not name.startswith("libc."):
                wanted.append("libgcc_s.so.1")  # glibc opens it when that is called


def needed_libraries(content: bytes) -> list[str]:
    """DT_NEEDED and PT_INTERP of a 64-bit little-endian ELF file (System V gABI, chapters 4 and 5); empty for a
    static program or a script."""
    if content[:6] != b"\x7fELF\x02\x01":
        return []
    (offset,) = struct.unpack_from("<Q", content, 0x20)
    size, count = struct.unpack_from("<HH", content, 0x36)
    headers = [struct.unpack_from("<IIQQQQQQ", content, offset + i * size) for i in range(count)]
    loads = [header for header in headers if header[0] == 1]
    found = [_text(content, header[2]) for header in headers if header[0] == 3]

    def at(address: int) -> int:
        for _, _, start, virtual, _, length, _, _ in loads:
            if virtual <= address < virtual + length:
                return int(start + address - virtual)
        raise Unsupported(f"ELF address {address:#x} is in no segment")

    for _, _, start, _, _, length, _, _ in (header for header in headers if header[0] == 2):
        tags = list(struct.iter_unpack("<QQ", content[start : start + length - length % 16]))
        strings = next((at(value) for tag, value in tags if tag == 5), 0)
        found += [_text(content, strings + value) for tag, value in tags if tag == 1]
    return found


def add_modules(tree: Tree, root: Path, release: str, load: Iterable[str], extra: Iterable[str]) -> None:
    """Kernel modules with what they depend on, unpacked; `modules.dep` and `modules.alias` for modprobe, and
    `/etc/modules`: what to load at boot. A module that the kernel has not, or has built in, is left out."""
    modules = {_module_name(path): path for path in sorted(_modules_folder(root, release).rglob("*.ko*"))}
    needs: dict[str, list[str]] = {}
    aliases: list[str] = []

    def add(name: str) -> bool:
        if name in needs:
            return True
        if name not in modules:
            return False
        content = _unpacked(modules[name])
        needs[name] = []
        tree.file(f"usr/lib/modules/{release}/{name}.ko", content)
        # .modinfo is a list of NUL-terminated key=value; names there may be written with - or _
        aliases.extend(f"alias {a.decode()} {name}\n" for a in re.findall(rb"\0alias=([^\0 ]+)(?=\0)", content))
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in (match[1].decode() if match else "").split(","):
            if other and add(_normal(other)):
                needs[name] += [_normal(other), *needs[_normal(other)]]
        return True

    loaded = [name for name in map(_normal, load) if add(name)]
    for name in map(_normal, extra):
        add(name)
    # modprobe loads the list from its end, so what others need comes last, and each once.
    dependencies = "".join(
        f"{name}.ko: {' '.join(f'{other}.ko' for other in _last_of_each(others))}".rstrip() + "\n"
        for name, others in needs.items()
    )
    tree.file(f"usr/lib/modules/{release}/modules.dep", dependencies.encode())
    tree.file(f"usr/lib/modules/{release}/modules.alias", "".join(aliases).encode())
    tree.file("etc/modules", "".join(f"{name}\n" for name in loaded).encode())


def kernel_release(root: Path) -> str:
    """The release of the one kernel in this root. Raises `RecipeInvalid` when there is none, or several."""
    releases = sorted(path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*"))
    if len(releases) != 1:
        raise RecipeInvalid(f"one kernel is expected, the packages bring {releases or 'none'}", field="kernel")
    return releases[0]


def link_applets(tree: Tree, applets: Iterable[str]) -> None:
    """busybox under the name of each applet (given with its folder, as `sbin/init`) that no other program has."""
    for applet in applets:
        folder, _, name = applet.removeprefix("usr/").rpartition("/")
        if folder and not any(f"usr/{other}/{name}" in tree.entries for other in ("bin", "sbin")):
            tree.link(f"usr/{folder}/{name}", "/usr/bin/busybox")


def _last_of_each(names: list[str]) -> list[str]:
    return list(dict.fromkeys(reversed(names)))[::-1]


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _module_name(path: Path) -> str:
    return _normal(path.name.split(".ko", 1)[0])


def _modules_folder(root: Path, release: str) -> Path:
    for folder in ("usr/lib/modules", "lib/modules"):
        if (root / folder / release).is_dir():
            return root / folder / release
    raise RecipeInvalid(f"kernel {release} brings no modules", field="kernel")


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return content


def _text(content: bytes, offset: int) -> str:
    return content[offset : content.index(b"\0", offset)].decode()


def _find(root: Path, folders: Iterable[str], name: str) -> Path | None:
    for folder in folders:
        path = root / folder / name
        if path.is_symlink() or path.is_file():
            return path
    return None


def _real(root: Path, path: Path) -> Path:
    """Follow links inside `root`: an absolute one means the guest's root, not ours."""
    for _ in range(10):
        if not path.is_symlink():
            return path
        target = path.readlink()
        path = root / str(target).lstrip("/") if target.is_absolute() else path.parent / target
    raise Unsupported(f"{path} is a loop of links")
