"""What our firewall, names and taps cost a guest's packets: against the same QEMU on a hand-made tap and bridge.

    .venv/bin/python bench/network.py [ROUNDS]

TCP throughput host ↔ guest and guest ↔ guest, and round trips, in turn for ours and for the bare one; then the
creation of a network, and a card that is added to a running guest. Each has a network namespace and two guests, which
run a small Perl server: iperf3 would have to be on the host, too, and tells no round trips. Needs root.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from common import Daemon, inside, median, running_daemon, say, timed
from namespaces import namespace, run

from innkeeper.client.wishes import vm_spec
from innkeeper.qemu import cards
from innkeeper.qemu.cgroup import place
from innkeeper.qemu.monitor import Monitor

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
SIZE, TRIPS, PORT = 32 << 20, 200, 5000

SERVER = r"""
socket(S, 2, 1, 6); setsockopt(S, 1, 2, pack("i", 1)); bind(S, pack("S n N x8", 2, 5000, 0)) or die; listen(S, 9);
$SIG{CHLD} = "IGNORE"; $zeros = "\0" x 65536;
sub get { my ($from, $left) = @_; while ($left > 0) { $left -= sysread($from, $b, 65536) || last } }
while (accept(C, S)) {
    unless (fork) {
        setsockopt(C, 6, 1, pack("i", 1));
        sysread(C, $order, 9);
        ($what, $size, $peer) = unpack("a N a4", $order);
        if ($what eq "e") { syswrite(C, $b) while sysread(C, $b, 64) }
        if ($what eq "s") { while ($size > 0) { $size -= syswrite(C, $zeros) || last } sysread(C, $b, 1) }
        if ($what eq "r") { get(\*C, $size); syswrite(C, "k") }
        if ($what eq "p") {
            socket(P, 2, 1, 6); connect(P, pack("S n a4 x8", 2, 5000, $peer));
            syswrite(P, pack("a N a4", "s", $size, ""));
            get(\*P, $size); syswrite(C, "k");
        }
        exit;
    }
    close C;
}
"""
"""Orders of nine bytes: e(cho), s(end), r(eceive), p(ull from a peer)."""


class Side:
    """Two guests in a namespace, by their addresses."""

    def __init__(self, namespace: str, addresses: list[str]) -> None:
        self._namespace, self._addresses = namespace, addresses

    def connect(self, order: str, size: int = 0) -> socket.socket:
        """A connection to the first guest, with an order for it."""
        with inside(self._namespace):
            connection = socket.socket()
        connection.settimeout(120)
        connection.connect((self._addresses[0], PORT))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = socket.inet_aton(self._addresses[1])
        connection.sendall(order.encode() + size.to_bytes(4, "big") + peer)
        return connection

    def wait(self) -> None:
        """Until both serve."""
        deadline = time.monotonic() + 120
        while True:
            try:
                with self.connect("p", 1) as connection:
                    if connection.recv(1) == b"k":
                        return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def guest_to_host(self) -> float:
        with self.connect("s", SIZE) as connection:
            return timed(lambda: _receive(connection, SIZE))

    def host_to_guest(self) -> float:
        with self.connect("r", SIZE) as connection:

            def send() -> None:
                connection.sendall(bytes(SIZE))
                connection.recv(1)

            return timed(send)

    def guest_to_guest(self) -> float:
        with self.connect("p", SIZE) as connection:
            return timed(lambda: connection.recv(1))

    def round_trip(self) -> float:
        def once() -> None:
            connection.sendall(b"x")
            connection.recv(64)

        with self.connect("e") as connection:
            return median([timed(once) for _ in range(TRIPS)])


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(1 << 20)
    while size > 0:
        got = connection.recv_into(buffer)
        if not got:
            raise ConnectionError("the guest has ended early")
        size -= got


def program(*first: str) -> str:
    return "\n".join(["#!/bin/sh", *first, f"exec perl -e '{SERVER}' >/dev/null 2>&1 &", ""])


def ours(daemon: Daemon, host: str) -> Side:
    """Two guests in a nat network."""
    daemon.inn.network_create("lab").wait()
    for name in ("a", "b"):
        daemon.inn.create(spec(name, program(), "lab")).wait()
    return Side(host, [daemon.inn.vm(name).info["address"] for name in ("a", "b")])


def spec(name: str, script: str, network: str) -> dict:
    return vm_spec(name, "tiny", memory="256M", disk="8M", cpus=1, network=network, user_data=script)


def bare(daemon: Daemon, host: str, stack: ExitStack) -> Side:
    """The same commands by hand, on a bridge of nobody's."""
    run(host, "ip", "link", "add", "br0", "type", "bridge")
    run(host, "ip", "addr", "add", "10.99.0.1/24", "dev", "br0")
    run(host, "ip", "link", "set", "br0", "up")
    addresses = ["10.99.0.2", "10.99.0.3"]
    for number, address in enumerate(addresses):
        name, tap = f"bare-{number}", f"tap{number}"
        setting = f"killall udhcpc; sleep 1; ip addr add {address}/24 dev eth0; ip link set eth0 up"
        daemon.inn.create(spec(name, program(setting), "lab")).wait()
        vm = daemon.inn.vm(name)
        folder, argv = daemon.home.vm(vm.info["id"]), Path(f"/proc/{vm.info['pid']}/cmdline").read_text().split("\0")
        vm.stop(force=True)
        for stale in folder.glob("*.sock"):
            stale.unlink()
        run(host, "ip", "tuntap", "add", tap, "mode", "tap", "vnet_hdr")
        run(host, "ip", "link", "set", tap, "master", "br0", "up")
        at = argv.index("-netdev") + 1
        card = {"type": "tap", "ifname": tap, "script": "no", "downscript": "no", "id": json.loads(argv[at])["id"]}
        argv[at] = json.dumps(card)
        argv.remove("-S")
        command = ["nsenter", f"--net=/run/netns/{host}", *argv[:-1]]
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)
        asyncio.run(place(daemon.home, vm.info["id"], process.pid))  # or it has another share of a busy host's CPUs
        stack.callback(process.wait)
        stack.callback(process.kill)
    return Side(host, addresses)


def add_card(daemon: Daemon) -> float:
    """Seconds that a card takes to be in a guest of ours; it is away again afterwards."""
    vm = daemon.inn.vm("a")
    seconds = timed(lambda: vm.nic_add(network="lab").wait())
    vm.nic_remove(1).wait()
    return seconds


def add_card_by_hand(folder: Path, host: str) -> float:
    """The same with a tap that is there, on a bridge, by QEMU alone."""
    run(host, "ip", "tuntap", "add", "more", "mode", "tap", "vnet_hdr")
    run(host, "ip", "link", "set", "more", "master", "br0", "up")
    netdev = {"type": "tap", "id": "net1", "ifname": "more", "script": "no", "downscript": "no"}
    device = {"driver": "virtio-net-pci", "id": "nic1", "bus": "spare0", "netdev": "net1", "romfile": ""}

    async def add() -> float:
        monitor = await Monitor.connect(folder)
        try:
            begun = time.perf_counter()
            await monitor.execute("netdev_add", netdev)
            await monitor.execute("device_add", device)
            seconds = time.perf_counter() - begun
            await cards.unplug(monitor, 1, 60)
        finally:
            await monitor.close()
        return seconds

    try:
        return asyncio.run(add())
    finally:
        run(host, "ip", "link", "del", "more")


def main() -> None:
    with namespace("ours") as host, namespace("bare") as other, ExitStack() as stack:
        daemon = stack.enter_context(running_daemon("tiny", namespace=host))
        sides = {"ours": ours(daemon, host), "bare": bare(daemon, other, stack)}
        for side in sides.values():
            side.wait()
        accelerator = daemon.inn.host()["accelerator"]["name"]
        print(f"accelerator: {accelerator}, {ROUNDS} rounds, medians; {SIZE >> 20} MiB, {TRIPS} round trips each")
        for what in ("guest_to_host", "host_to_guest", "guest_to_guest", "round_trip"):
            seconds: dict[str, list[float]] = {"ours": [], "bare": []}
            for number in range(ROUNDS):
                for name in sorted(sides, reverse=bool(number % 2)):
                    seconds[name].append(getattr(sides[name], what)())
            mine, peer = median(seconds["ours"]), median(seconds["bare"])
            words = what.replace("_", " ")
            if what == "round_trip":
                say(words, f"{mine * 1e6:.0f} µs", f"{peer * 1e6:.0f} µs", mine / peer, "at most 1.05")
            else:
                rate = [f"{SIZE * 8 / time / 1e6:.0f} Mbit/s" for time in (mine, peer)]
                say(words, *rate, peer / mine, "at least 0.95")
        times = []
        for _ in range(ROUNDS):
            times.append(timed(lambda: daemon.inn.network_create("more").wait()))
            daemon.inn.network_delete("more").wait()
        print(f"creating a network: {median(times) * 1000:.0f} ms (wanted: at most 300)")
        folder = daemon.home.vm(daemon.inn.vm("bare-0").info["id"])
        mine, peer = (
            median([take() for _ in range(ROUNDS)])
            for take in (lambda: add_card(daemon), lambda: add_card_by_hand(folder, other))
        )
        words = f"ours {mine * 1000:.0f} ms, QEMU alone {peer * 1000:.0f} ms"
        print(f"adding a card to a running guest: {words}, {(mine - peer) * 1000:.0f} ms more (wanted: at most 200)")


if __name__ == "__main__":
    main()
