"""The SDK: wishes as documents, HTTP that notices every broken answer, and the API of a real daemon."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.client import ApiError, DaemonUnreachable, Innkeeper, SocketForbidden, vm_spec
from innkeeper.client.api import find_socket
from innkeeper.client.wishes import endpoint, parse_publish

# --- wishes ---


def test_a_wish_leaves_out_what_was_not_said():
    assert vm_spec("web", "debian-12") == {"name": "web", "image": "debian-12"}


def test_a_whole_wish_is_a_spec_that_the_daemon_takes(tmp_path):
    from innkeeper.spec.vm import VMSpec

    spec = vm_spec(
        "web", "debian-12", cpus=4, memory="2G", disk=["20G", "1T"], firmware="uefi", iso=tmp_path / "x.iso",
        publish=["8080:80", "0.0.0.0:53:53/udp"], user="me", ssh_keys=["ssh-ed25519 AAAA x"], user_data="#cloud-config",
        network_config="version: 2", env={"A": "b"}, note="n",
    )  # fmt: skip
    model = VMSpec.model_validate(spec)
    assert model.memory == 2 << 30 and [disk.size for disk in model.disks] == [20 << 30, 1 << 40]
    assert model.nics[0].publish[1].protocol == "udp" and model.first_boot.env == {"A": "b"}


def test_a_relative_disc_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert vm_spec("x", iso="disc.iso")["iso"] == str(tmp_path / "disc.iso")


@pytest.mark.parametrize(
    "text", ["", "80", "80:", ":80", "0:1", "1:65536", "a:b", "1:2/icmp", "1:2:3:4", "::1:1:1", "[::1]80:80"]
)
def test_ports_that_make_no_sense(text):
    with pytest.raises(InvalidInput):
        parse_publish(text)


def test_the_address_of_a_port():
    for text, address in (("127.0.0.1:80:81", "127.0.0.1"), ("[::1]:80:81", "::1"), ("[::]:80:81", "::")):
        assert parse_publish(text) == {"address": address, "host": 80, "guest": 81}
        assert endpoint(address, 80) == text.removesuffix(":81")


def test_a_port_cannot_lead_through_an_unplugged_cable():
    with pytest.raises(InvalidInput):
        vm_spec("x", "tiny", nic="none", publish=["1:1"])
    assert vm_spec("x", "tiny", nic="none")["nics"] == [{"mode": "none", "publish": []}]


# --- HTTP ---


@pytest.fixture
def answering():
    """A server that reads one request and answers with given bytes, one request per answer."""
    with tempfile.TemporaryDirectory(prefix="inn-test-") as folder:
        path = Path(folder) / "api.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        requests: list[bytes] = []

        def serve(*answers: bytes, read_body: bool = True) -> tuple[Innkeeper, list[bytes]]:
            def run() -> None:
                with suppress(OSError):  # the client may have left already
                    for answer in answers:
                        connection, _ = listener.accept()
                        with connection:
                            requests.append(_request(connection, read_body))
                            connection.sendall(answer)

            threading.Thread(target=run, daemon=True).start()
            return Innkeeper(path), requests

        yield serve
        listener.close()


def _request(connection: socket.socket, whole: bool) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    if whole and b"chunked" in head:
        while not body.endswith(b"0\r\n\r\n"):
            body += connection.recv(65536)
    elif whole and b"Content-Length: " in head:
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def test_bodies_end_by_length_by_chunk_or_by_the_connection(answering):
    inn, requests = answering(
        b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}ignored',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4;x=y\r\n":2}\r\n0\r\n\r\n',
        b'HTTP/1.0 200 OK\r\n\r\n{"a":3}',
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    )
    assert [inn.call("GET", "/x") for _ in range(4)] == [{"a": 1}, {"a": 2}, {"a": 3}, None]
    assert requests[0].startswith(b"GET /v1/x HTTP/1.1\r\n") and b"Connection: close" in requests[0]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ],
)
def test_a_broken_answer_is_an_error_and_never_a_short_one(answering, answer):
    inn, _ = answering(answer)
    with pytest.raises(DaemonUnreachable):
        inn.call("GET", "/x")


def test_a_problem_becomes_an_error(answering):
    body = b'{"code":"name-taken","status":409,"detail":"taken","hint":"choose","facts":{"name":"web"}}'
    inn, _ = answering(
        b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops",
    )
    with pytest.raises(ApiError) as caught:
        inn.call("GET", "/x")
    error = caught.value
    assert (error.code, error.status, error.detail, error.hint) == ("name-taken", 409, "taken", "choose")
    assert error.facts == {"name": "web"}
    with pytest.raises(ApiError, match="502: oops"):
        inn.call("GET", "/x")


def test_a_body_of_unknown_length_goes_in_chunks(answering):
    none = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"
    inn, requests = answering(none, none, none)
    inn.vm("a b").write_file("/x y", iter([b"one", b"", b"two"]), mode=0o600)
    inn.vm("a").write_file("/x", iter([b"one", b"two"]), length=6)
    inn.vm("a").write_file("/x", b"all")
    assert requests[0].startswith(b"PUT /v1/vms/a%20b/files?path=%2Fx%20y&mode=0600 HTTP/1.1\r\n")
    assert requests[0].endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    assert requests[1].endswith(b"\r\n\r\nonetwo") and b"Content-Length: 6" in requests[1]
    assert requests[2].endswith(b"\r\n\r\nall")


def test_a_file_that_shrinks_meanwhile_is_an_error(answering):
    inn, _ = answering()  # nobody reads, and so nobody refuses before the end
    with pytest.raises(InvalidInput, match="changed its size"):
        inn.vm("a").write_file("/x", iter([b"one"]), length=6)


def test_a_refusal_before_the_end_of_the_body_is_heard(answering):
    body = b'{"code":"not-found","detail":"no such VM"}'
    inn, _ = answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), read_body=False)
    with pytest.raises(ApiError, match="no such VM"):
        inn.vm("a").write_file("/x", (os.urandom(65536) for _ in range(200)))


def test_events_are_read_from_their_stream(answering):
    stream = b': hello\n\nid: 1\ndata: {"seq": 1}\n\nid: 2\ndata: {"seq": 2}\n\n'
    inn, requests = answering(b"HTTP/1.0 200 OK\r\n\r\n" + stream)
    assert [event["seq"] for event in inn.events(follow=True, tail=2)] == [1, 2]
    assert b"GET /v1/events?follow=true&tail=2 " in requests[0]


def test_a_command_whose_end_nobody_told_is_an_error(answering):
    inn, _ = answering(b'HTTP/1.0 200 OK\r\n\r\n{"stdout":"aGk="}\n', b'HTTP/1.0 200 OK\r\n\r\n{"signal":9}\n')
    with pytest.raises(DaemonUnreachable, match="before the command did"):
        inn.vm("a").exec(["true"])
    assert inn.vm("a").exec(["true"]).status == 137


def test_nobody_answers(tmp_path):
    inn = Innkeeper(tmp_path / "api.sock")
    with pytest.raises(DaemonUnreachable) as caught:
        inn.version()
    assert "inn daemon start" in caught.value.hint
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "api.sock"))
    with pytest.raises(DaemonUnreachable):
        inn.version()


def test_a_deep_folder_is_no_obstacle(tmp_path):
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    handle = os.open(folder, os.O_PATH)
    listener.bind(f"/proc/self/fd/{handle}/api.sock")
    os.close(handle)
    listener.listen()
    Innkeeper(folder / "api.sock").connect().close()
    listener.close()


def test_a_socket_of_others_says_how_to_get_in(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    folder = tempfile.mkdtemp(prefix="inn-test-")
    path = Path(folder) / "api.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o660)
    os.chown(path, 0, 4)  # adm
    Path(folder).chmod(0o755)
    try:
        os.seteuid(65534)
        with pytest.raises(SocketForbidden) as caught:
            Innkeeper(path).version()
    finally:
        os.seteuid(0)
        listener.close()
        path.unlink()
        Path(folder).rmdir()
    assert "sudo" in caught.value.hint


def test_when_nobody_answers_the_daemon_can_be_started(tmp_path):
    path = tmp_path / "api.sock"
    listener = socket.socket(socket.AF_UNIX)

    def start(error: DaemonUnreachable) -> None:
        listener.bind(str(path))
        listener.listen()

    Innkeeper(path, when_unreachable=start).connect().close()
    listener.close()


def test_the_socket_to_ask(tmp_path):
    assert find_socket({"INNKEEPER_HOME": str(tmp_path)}) == str(tmp_path / "run/api.sock")


# --- a real daemon ---


def test_the_host_of_a_real_daemon(daemon):
    inn = daemon.inn
    assert inn.version()["home"] == str(daemon.home.data)
    facts = inn.host()
    assert facts["accelerator"]["name"] in ("kvm", "tcg") and facts["capacity"]["pool_total"] > 0
    assert "tiny" in [image["name"] for image in inn.images()]
    assert inn.image("tiny")["users"] == []
    assert "tiny" in [recipe["name"] for recipe in inn.recipes()]
    assert isinstance(list(inn.events()), list)


def test_errors_of_a_real_daemon(daemon):
    inn = daemon.inn
    for ask in (lambda: inn.vm("nope").info, lambda: inn.image("nope"), lambda: inn.operation("nope")):
        with pytest.raises(ApiError) as caught:
            ask()
        assert caught.value.status == 404 and caught.value.code == "not-found"
    with pytest.raises(ApiError) as caught:
        inn.create({"name": "X!", "cpus": 0})
    assert caught.value.status == 422
    assert {field for field, _ in caught.value.fields} >= {"spec.name", "spec.cpus"}


def test_a_vm_is_made_and_deleted(daemon):
    inn = daemon.inn
    seen: list[str] = []
    operation = inn.create(vm_spec("sdk-made", "tiny", memory="160M", disk="1G"), start=False)
    operation.wait(lambda one: seen.append(one.state))
    assert seen[-1] == "done" and operation.ended and operation.error is None
    vm = inn.vm("sdk-made")
    assert vm.state == "stopped" and vm.info["memory"] == 160 << 20
    assert "sdk-made" in [document["name"] for document in inn.vms()]
    assert inn.apply([vm.export() | {"state": "stopped"}])["changes"][0]["action"] == "none"
    assert vm.stop().idle
    assert operation.id in [one.id for one in inn.operations(target="sdk-made")]
    with pytest.raises(ApiError) as caught:
        vm.exec(["true"])
    assert caught.value.code == "action-refused"
    vm.delete()
    with pytest.raises(ApiError):
        vm.info  # noqa: B018 - a property that asks
