"""Files in a folder that somebody else may write to."""

import io
import os

import pytest

from innkeeper.base.errors import ImageUnsafe
from innkeeper.base.nofollow import open_file, take_file, write_file


@pytest.fixture
def treasure(tmp_path):
    """A file that nothing may read, change, or give away."""
    path = tmp_path / "treasure"
    path.write_bytes(b"gold")
    path.chmod(0o640)
    yield path
    assert path.read_bytes() == b"gold"
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_is_there_is_read_and_replaced(tmp_path):
    path = tmp_path / "file"
    write_file(path, io.BytesIO(b"one"))
    write_file(path, io.BytesIO(b"two"), os.geteuid())
    with open_file(path, 3) as file:
        assert file.read() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    take_file(path, tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_link_is_not_followed(tmp_path, treasure):
    link = tmp_path / "link"
    link.symlink_to(treasure)
    with pytest.raises(ImageUnsafe):
        open_file(link, 100)
    with pytest.raises(ImageUnsafe, match="no regular file"):
        take_file(link, tmp_path / "taken")
    (tmp_path / "link.new").symlink_to(treasure)
    write_file(link, io.BytesIO(b"lead"))
    assert link.read_bytes() == b"lead" and not link.is_symlink()
    assert not os.path.lexists(tmp_path / "link.new")


def test_what_is_no_file_or_too_large(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for name in ("folder", "pipe", "large"):
        with pytest.raises(ImageUnsafe):
            open_file(tmp_path / name, 10)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "gone", 10)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError("broken")

    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="broken"):
        write_file(path, io.BufferedReader(Broken()))
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
