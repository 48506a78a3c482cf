"""Folders as tar streams; and that a guest's stream never writes outside its destination."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.cli import archive


def packed(source, name="root") -> io.BytesIO:
    out = io.BytesIO()
    archive.pack(source, name, out, lambda count: None)
    out.seek(0)
    return out


def made(*members: tuple[str, dict, bytes]) -> io.BytesIO:
    """A stream with just these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


FOLDER = {"type": tarfile.DIRTYPE, "mode": 0o755}


def test_a_folder_comes_back_as_it_was(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "run").write_bytes(b"#!/bin/sh\n")
    (source / "run").chmod(0o751)
    (source / "sub" / "ein lange'r näme").write_bytes(os.urandom(100_000))
    (source / "sub").chmod(0o500)
    (source / "link").symlink_to("/etc/passwd")
    os.link(source / "run", source / "twin")
    counted: list[int] = []
    stream = packed(source)
    assert archive.unpack(stream, tmp_path / "back", counted.append) == 4
    back = tmp_path / "back"
    assert (back / "sub" / "ein lange'r näme").read_bytes() == (source / "sub" / "ein lange'r näme").read_bytes()
    assert (back / "run").stat().st_mode & 0o777 == 0o751 and (back / "sub").stat().st_mode & 0o777 == 0o500
    assert (back / "link").readlink().as_posix() == "/etc/passwd"
    assert (back / "twin").read_bytes() == b"#!/bin/sh\n"
    assert sum(counted) >= archive.total_size(source)
    (source / "sub").chmod(0o700), (back / "sub").chmod(0o700)


def test_a_single_file_and_a_link_to_one(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    archive.unpack(packed(tmp_path / "link"), tmp_path / "out", lambda count: None)
    assert (tmp_path / "out").read_bytes() == b"x" and not (tmp_path / "out").is_symlink()
    (tmp_path / "file").write_bytes(b"new")
    archive.unpack(packed(tmp_path / "file"), tmp_path / "out", lambda count: None)
    assert (tmp_path / "out").read_bytes() == b"new"


@pytest.mark.parametrize(
    "members",
    [
        [("root", FOLDER, b""), ("root/../../evil", {}, b"x")],
        [("/etc/evil", {}, b"x")],
        [("../evil", {}, b"x")],
        [("root", FOLDER, b""), ("other/evil", {}, b"x")],
        [("root", FOLDER, b""), ("root/hard", {"type": tarfile.LNKTYPE, "linkname": "../../secret"}, b"")],
        [("root", FOLDER, b""), ("root/hard", {"type": tarfile.LNKTYPE, "linkname": "/secret"}, b"")],
    ],
)
def test_a_stream_that_points_outside_is_refused(members, tmp_path):
    (tmp_path / "secret").write_text("canary")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises((InvalidInput, OSError)):
        archive.unpack(made(*members), inside / "out", lambda count: None)
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.rglob("hard"))


def test_nothing_is_written_through_a_link(tmp_path):
    """A link to a folder first, then a file below it: made last, the link is no way out."""
    out = tmp_path / "outside"
    out.mkdir()
    link = ("root/way", {"type": tarfile.SYMTYPE, "linkname": str(out)}, b"")
    with pytest.raises((InvalidInput, OSError)):
        archive.unpack(made(("root", FOLDER, b""), link, ("root/way/evil", {}, b"x")), tmp_path / "d", lambda c: None)
    assert not list(out.iterdir())


def test_a_link_of_an_earlier_copy_is_no_way_out_either(tmp_path):
    out, target = tmp_path / "outside", tmp_path / "d"
    out.mkdir(), target.mkdir()
    (target / "way").symlink_to(out)
    (target / "file").symlink_to(out / "file")
    with pytest.raises(InvalidInput, match="symbolic link"):
        archive.unpack(made(("root", FOLDER, b""), ("root/way/evil", {}, b"x")), target, lambda count: None)
    with pytest.raises(InvalidInput, match="not a folder"):
        archive.unpack(made(("root", FOLDER, b""), ("root/way", FOLDER, b"")), target, lambda count: None)
    archive.unpack(made(("root", FOLDER, b""), ("root/file", {}, b"x")), target, lambda count: None)
    assert not list(out.iterdir()) and (target / "file").read_bytes() == b"x"


def test_devices_are_left_out(tmp_path):
    node = ("root/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b"")
    archive.unpack(made(("root", FOLDER, b""), node), tmp_path / "d", lambda count: None)
    assert not list((tmp_path / "d").iterdir())
    os.mkfifo(tmp_path / "d" / "pipe")
    with tarfile.open(fileobj=packed(tmp_path / "d")) as tar:
        assert tar.getnames() == ["root"]


def test_setuid_does_not_come_along(tmp_path):
    archive.unpack(made(("root", {"mode": 0o4755}, b"x")), tmp_path / "f", lambda count: None)
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o755
