"""The embedded store: one SQLite file in WAL mode, one writer, all documents in memory for reading.

The daemon is the only process that opens it (`server/daemon.py` holds a lock). A full disk must not keep the daemon
from recording that a guest was paused by that very disk, so a few MiB of ballast lie beside the database and are let
go when SQLite finds no room.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import structlog

from innkeeper.base.errors import StoreFailed
from innkeeper.base.units import MIB
from innkeeper.store.contract import Document
from innkeeper.store.memory import MemoryStore

log = structlog.get_logger()

BALLAST = 8 * MIB
CHECKPOINT = 1000
"""Pages of the log after which a synced transaction brings them into the database, which takes syncs of its own."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS document (key TEXT PRIMARY KEY, revision INTEGER NOT NULL, value TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('schema', 1), ('revision', 0);
"""


class SQLiteStore(MemoryStore):
    """Opens (or makes) the database at `path`, mode 0600. Raises `StoreFailed` when it is damaged."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._ballast = path.with_name(path.name + ".ballast")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._synced: bool | None = None
        """How the last transaction was written."""
        path.touch(0o600)
        try:
            self._db = self._open()
            self._load()
        except sqlite3.Error as error:
            raise StoreFailed(
                f"{path} cannot be read: {error}",
                hint="restore it from a copy, or move it away to begin anew",
            ) from None
        self._refill()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)
        except sqlite3.OperationalError as error:
            if "full" not in str(error) or not self._let_go():
                raise
            db.close()
            return self._open()
        return db

    def _load(self) -> None:
        (schema,) = self._db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        if schema != 1:
            raise StoreFailed(f"{self._path} has schema {schema}, and this Innkeeper reads 1", hint="upgrade it")
        for key, revision, text in self._db.execute("SELECT key, revision, value FROM document ORDER BY key"):
            self._documents[key] = Document(key, revision, json.loads(text))
            self._keys.append(key)
        (self._revision,) = self._db.execute("SELECT value FROM meta WHERE name = 'revision'").fetchone()
        self._forgotten = self._revision

    def _refill(self) -> None:
        """Put the ballast back where there is room for it and for as much again."""
        with suppress(OSError):
            room = os.statvfs(self._path.parent)
            if not self._ballast.exists() and room.f_bavail * room.f_frsize > 4 * BALLAST:
                with self._ballast.open("xb") as file:
                    os.posix_fallocate(file.fileno(), 0, BALLAST)

    def _let_go(self) -> bool:
        try:
            self._ballast.unlink()
        except OSError:
            return False
        log.warning("the disk is full: ballast released", path=str(self._ballast))
        return True

    async def _persist(self, revision: int, texts: Mapping[str, str | None], synced: bool) -> None:
        if not synced:  # a copy into the page cache, which takes less time than waking a thread
            return self._commit(revision, texts, synced)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, revision, texts, synced)

    def _commit(self, revision: int, texts: Mapping[str, str | None], synced: bool) -> None:
        try:
            try:
                self._write(revision, texts, synced)
            except sqlite3.OperationalError as error:
                if "full" not in str(error) or not self._let_go():
                    raise
                self._write(revision, texts, synced)
        except sqlite3.Error as error:
            raise StoreFailed(
                f"{self._path} could not be written: {error}", hint="make room on its file system"
            ) from None

    def _write(self, revision: int, texts: Mapping[str, str | None], synced: bool) -> None:
        db = self._db
        # In WAL mode NORMAL leaves out the sync of the log; the next one, of the same file, includes what it left out.
        if synced != self._synced:
            db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT if synced else 0}")
            self._synced = synced
        db.execute("BEGIN IMMEDIATE")
        try:
            for key, text in texts.items():
                if text is None:
                    db.execute("DELETE FROM document WHERE key = ?", (key,))
                else:
                    db.execute("REPLACE INTO document VALUES (?, ?, ?)", (key, revision, text))
            db.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    async def close(self) -> None:
        """Wait for the last write and close the file."""
        async with self._writing:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()
