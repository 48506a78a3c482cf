"""One contract, every store."""

import asyncio
import os
import sqlite3
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from innkeeper.base.errors import Conflict, NotFound, StoreFailed
from innkeeper.store.contract import update
from innkeeper.store.memory import REMEMBERED, MemoryStore
from innkeeper.store.sqlite import SQLiteStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "store.db")
    yield made
    await made.close()


async def test_what_is_written_can_be_read(store):
    assert await store.get("vm/a") is None
    revision = await store.transact({"vm/a": {"n": 1}, "vm/b": {"n": 2}, "vmx/c": {}})
    document = await store.get("vm/a")
    assert (document.value, document.revision) == ({"n": 1}, revision)
    assert [d.key for d in await store.list("vm/")] == ["vm/a", "vm/b"]
    await store.transact({"vm/a": None})
    assert [d.key for d in await store.list("vm/")] == ["vm/b"]


async def test_all_or_nothing(store):
    first = await store.transact({"a": {"n": 1}})
    await store.transact({"a": {"n": 2}}, {"a": first})
    with pytest.raises(Conflict) as caught:
        await store.transact({"a": {"n": 3}, "b": {"n": 3}}, {"b": 0, "a": first})
    assert caught.value.facts["key"] == "a"
    assert (await store.get("a")).value == {"n": 2}
    assert await store.get("b") is None


async def test_zero_means_absent(store):
    await store.transact({"name/vm/web": {"id": "1"}}, {"name/vm/web": 0})
    with pytest.raises(Conflict):
        await store.transact({"name/vm/web": {"id": "2"}}, {"name/vm/web": 0})


async def test_callers_keep_their_own_copy(store):
    value = {"list": [1]}
    await store.transact({"a": value})
    value["list"].append(2)
    assert (await store.get("a")).value == {"list": [1]}


async def test_update_retries_until_it_wins(store):
    await store.transact({"n": {"count": 0}})
    await asyncio.gather(*(update(store, "n", lambda v: v | {"count": v["count"] + 1}) for _ in range(30)))
    assert (await store.get("n")).value == {"count": 30}
    with pytest.raises(NotFound):
        await update(store, "missing", lambda v: v)


async def test_watch_sees_old_and_new_in_order(store):
    start = store.revision
    await store.transact({"vm/a": {"n": 1}})

    async def collect():
        seen = []
        async for change in store.watch("vm/", start):
            seen.append((change.key, change.value))
            if len(seen) == 3:
                return seen

    task = asyncio.create_task(collect())
    await asyncio.sleep(0)
    await store.transact({"other": {}})
    await store.transact({"vm/a": {"n": 2}})
    await store.transact({"vm/a": None})
    assert await asyncio.wait_for(task, 5) == [("vm/a", {"n": 1}), ("vm/a", {"n": 2}), ("vm/a", None)]


async def test_a_watcher_that_comes_too_late_is_told(store):
    for start in range(0, REMEMBERED + 10, 1000):
        await store.transact({f"k/{start + i}": {} for i in range(1000)})
    with pytest.raises(Conflict):
        async for _ in store.watch("k/", 0):
            pass


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers())), max_size=30))
def test_sqlite_reopened_equals_memory(tmp_path_factory, writes):
    path = tmp_path_factory.mktemp("store") / "store.db"

    async def run():
        memory, sqlite = MemoryStore(), SQLiteStore(path)
        for key, number in writes:
            value = None if number is None else {"n": number}
            await memory.transact({key: value})
            await sqlite.transact({key: value})
        await sqlite.close()
        again = SQLiteStore(path)
        assert await again.list("") == await memory.list("")
        assert again.revision == memory.revision
        await again.close()

    asyncio.run(run())


async def test_the_file_is_private_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "store.db"
    store = SQLiteStore(path)
    await store.close()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreFailed, match=r"store\.db"):
        SQLiteStore(path)


async def test_cancelling_a_writer_keeps_database_and_memory_together(tmp_path):
    path = tmp_path / "store.db"
    store = SQLiteStore(path)
    for n in range(20):
        task = asyncio.create_task(store.transact({"k": {"n": n}}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await store.close()  # waits for the last write, whose caller has gone
    seen = await store.get("k")
    rows = sqlite3.connect(path).execute("SELECT revision FROM document").fetchall()
    assert [r[0] for r in rows] == ([seen.revision] if seen else [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.root
def test_a_full_disk_is_survived_on_ballast(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", mount]).returncode:
        pytest.skip("this container may not mount")
    try:
        asyncio.run(_fill_and_recover(mount))
    finally:
        subprocess.run(["umount", mount], check=True)


async def _fill_and_recover(mount):
    store = SQLiteStore(mount / "store.db")
    with pytest.raises(OSError), (mount / "filler").open("wb") as file:
        while True:
            file.write(b"x" * 65536)
    await store.transact({"vm/a": {"reason": "the pool is full" * 1000}})
    await store.close()
    again = SQLiteStore(mount / "store.db")
    assert await again.get("vm/a")
    for n in range(2000):
        try:
            await again.transact({f"big/{n}": {"text": "y" * 65536}})
        except StoreFailed as error:
            assert "full" in error.detail
            break
    else:
        pytest.fail("the disk never filled")
    (mount / "filler").unlink()
    await again.transact({"vm/a": {"reason": ""}})
    await again.close()


async def test_what_is_not_synced_outlives_its_daemon_and_comes_before_what_is(tmp_path):
    store = SQLiteStore(tmp_path / "store.db")
    await store.transact({"a": {"n": 1}}, synced=False)
    await update(store, "a", lambda value: {"n": value["n"] + 1}, synced=False)
    for name in ("store.db", "store.db-wal"):  # as a daemon that is killed leaves them
        (tmp_path / f"killed-{name}").write_bytes((tmp_path / name).read_bytes())
    (tmp_path / "killed-store.db-wal").rename(tmp_path / "killed.db-wal")
    (tmp_path / "killed-store.db").rename(tmp_path / "killed.db")
    await store.transact({"b": {}}, {"b": 0})
    await store.close()
    again, killed = SQLiteStore(tmp_path / "store.db"), SQLiteStore(tmp_path / "killed.db")
    assert [d.key for d in await again.list("")] == ["a", "b"]
    assert (await killed.get("a")).value == {"n": 2}
    await again.close()
    await killed.close()
