"""Disk image formats: our own header parsers, which run before any tool opens a stranger's file (DESIGN.md 2.11).

`inspect` is the one entry point; each other module reads one format. A parser accepts only what is self-contained:
it refuses every image that names another file, and every header that lies about where things are, because QEMU
opens whatever an image names.
"""

from innkeeper.storage.formats.detect import FORMATS, inspect, inspect_fd
from innkeeper.storage.formats.header import ImageHeader

__all__ = ["FORMATS", "ImageHeader", "inspect", "inspect_fd"]
