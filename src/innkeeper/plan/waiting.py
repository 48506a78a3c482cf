"""The process that waits in a captured guest, on a port of its own, and what it is told in a fork (plan/rebirth.py).

An emulated guest pays for whatever it executes for the first time, and a fork executes everything for the first time.
So the guest does nothing that can be done before the capture, or here: it has opened all that will be changed and told
what that is, and is handed a list of system calls. It needs Perl, as Debian and Ubuntu always have it, compiled before
the capture, and of that only what makes them.

System calls have the numbers of x86-64, as the machines do: write(2) 1, ioctl(2) 16, kill(2) 62,
ftruncate(2) 77, setpriority(2) 141, sched_setscheduler(2) 144, clock_settime(2) 227. random(4):
RNDADDENTROPY, RNDRESEEDCRNG; netdevice(7): SIOCSIFHWADDR; linux/route.h: SIOCDELRT; rtnetlink(7): RTM_NEWROUTE, of the
protocol «static», which systemd-networkd leaves alone (`rebirth.fixed`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from struct import pack

from innkeeper.plan.rebirth import CONFIGURATIONS, DONE, NAT, NETWORKD, Place, Rebirth, fixed, fixed_card

PORT = "org.innkeeper.rebirth.0"
HELLO = "innkeeper-waits"
"""The last line of what it tells before the capture, and what it calls itself among the guest's processes."""
LARGEST = 16384
"""Bytes of a file that tells a card by its MAC address, at most; a larger one stays as it is."""

_SETTLE, _ANEW = 0, 2
"""No system calls: put a card into its place; once the answer is given, have systemd-networkd read its files anew."""

_PERL = rf"""
sub get {{
  my ($from, $text) = (undef, "");
  open($from, "<", $_[0]) and sysread($from, $text, 65536);
  $text;
}}
my @open;
my $told = "";
sub hold {{
  my ($what, $file, $mask, @more) = @_;
  my $before = umask($mask // 022);
  my $opened = open(my $to, -e $file ? "+<" : "+>", $file);
  umask($before);
  $opened or return;
  push @open, $to;
  $told .= join(" ", $what, fileno $to, map {{ unpack "H*", $_ }} -s $to || 0, @more) . "\n";
}}
sub files {{
  my ($folder) = @_;
  opendir(my $all, $folder) or return;
  grep {{ -f && -s _ <= {LARGEST} }} map {{ "$folder/$_" }} readdir $all;
}}
hold("pool", "/dev/urandom");
hold("called", "/proc/sys/kernel/hostname");
hold("name", "/etc/hostname");
-f && !-l and hold("machine-id", $_) for "/etc/machine-id", "/var/lib/dbus/machine-id";
my @hosts = split(/^127\.0\.1\.1.*/m, get("/etc/hosts"), -1);
hold("hosts", "/etc/hosts", undef, @hosts) if @hosts > 1;
my $key = "/etc/ssh/ssh_host_ed25519_key";
if (-d "/etc/ssh") {{ hold("private", $key, 077); hold("public", "$key.pub") }}
get("/run/sshd.pid") =~ /^(\d+)/ and $told .= "sshd $1\n";
my $resolvers;
-f "/etc/resolv.conf" && !-l "/etc/resolv.conf" and open($resolvers, "+>>", "/etc/resolv.conf");
socket(my $any, 2, 2, 0);
opendir(my $nics, "/sys/class/net");
my %nic_with = map {{ get("/sys/class/net/$_/address") =~ /(.+)/ ? ($1 => $_) : () }} grep {{ !/^\./ }} readdir $nics;
my %index = map {{ ($_ => get("/sys/class/net/$_/ifindex") + 0) }} values %nic_with;
socket(my $netlink, 16, 3, 0);
$told .= join(" ", "card", fileno $any, map {{ unpack "H*", $_ }} $nic_with{{$_}}, $_) . "\n" for keys %nic_with;
my $switch = "/proc/sys/net/ipv6/conf/%s/disable_ipv6";
my %ipv6;
get(sprintf $switch, $_) =~ /^0/ and open($ipv6{{$_}}, "+<", sprintf $switch, $_) for values %nic_with;
opendir(my $dropped, "{NETWORKD}");
my @folders = map {{ "{NETWORKD}/$_" }} grep {{ /\.d$/ }} $dropped ? readdir $dropped : ();
for my $file (map {{ files($_) }} qw({" ".join(CONFIGURATIONS)}), @folders) {{
  my $text = get($file);
  hold("naming", $file, undef, $text) if grep {{ index($text, $_) >= 0 }} keys %nic_with;
}}
my ($again, @said);
sub card {{
  my ($nic, $what, $request) = @_;
  ioctl($any, $what, $request) or push @said, "$nic: $!\n";
}}
sub route {{
  my ($nic, $to, $hop) = @_;
  my $way = pack("C8 x4 S2 L S2 H8", 2, $to ? 32 : 0, 0, 0, 254, 4, 0, 1, 8, 4, $index{{$nic}}, 8, 5, $hop);
  $way .= pack("S2 H8", 8, 1, $to) if $to;
  my $answer = "";
  syswrite($netlink, pack("L S2 x8", 16 + length $way, 24, 0x605) . $way) and sysread($netlink, $answer, 4096);
  $! = -unpack("x16 l", $answer) if $answer;
  # Another card of the same network may have made it: EEXIST.
  $answer && ($! == 0 || $! == 17) or push @said, "$nic: $!\n";
}}
sub settle {{
  my ($nic, $address, $mask, $gateway, $resolver, $domain, $mtu, @hosts) = @_;
  card($nic, 0x8922, pack("a16 i x20", $nic, $mtu)) if $mtu;
  my $default = pack("x8 S x14 S x14 S x14 S x30 p x24", 2, 2, 2, 1, $nic);
  1 while ioctl($any, 0x890c, $default);
  for my $set ([0x8916, $address], [0x891c, $mask]) {{
    card($nic, $set->[0], pack("a16 S x2 a4 x16", $nic, 2, pack("H*", $set->[1])));
  }}
  route($nic, "", $gateway) if $gateway;
  while (my ($host, $hop) = splice(@hosts, 0, 2)) {{ route($nic, $host, $hop) }}
  if (my $off = $ipv6{{$nic}}) {{ sysseek($off, 0, 0) && syswrite($off, $_) for 1, 0 }}
  if ($resolvers) {{ truncate($resolvers, 0); syswrite($resolvers, "search $domain\nnameserver $resolver\n") }}
}}
$0 = "{HELLO}";
# Nobody who notices what it does shall have his turn before it has answered: SCHED_FIFO, or at least nice -20.
my $first = pack("i", 1);
syscall(144, 0, 1, $first) == 0 or syscall(141, 0, 0, -20);
open(my $port, "+<", $ARGV[0]) or exit 1;
syswrite($port, $told . "{HELLO}\n");
my ($text, $at, $call) = ("", 8, 0);
while (length $text < 8 || length $text < substr($text, 0, 8)) {{
  sysread($port, $text, 65536, length $text) or exit 1;
}}
while ($at < length $text) {{
  my $what = substr($text, $at, 4) + 0;
  my $file = substr($text, $at + 4, 6) + 0;
  my $number = substr($text, $at + 10, 12) + 0;
  my $size = substr($text, $at + 22, 6) + 0;
  my $data = substr($text, $at + 28, $size);
  $at = $at + 28 + $size;
  if ($what == {_SETTLE}) {{ settle(split(/,/, $data)) }}
  elsif ($what == {_ANEW}) {{ $again = 1 }}
  elsif ($what == 16) {{ syscall(16, $file, $number, $data) < 0 and push @said, "$call $!\n" }}
  elsif ($size) {{ syscall($what, $file, $data, $number) < 0 and push @said, "$call $!\n" }}
  else {{ syscall($what, $file, $number, 0) < 0 and push @said, "$call $!\n" }}
  $call = $call + 1;
}}
syswrite($port, join("", @said) . "{DONE}\n");
system("networkctl", "reload") if $again;
sleep;
"""
"""It stays: its end would be noticed, and noticing is work for the guest, and memory for the host."""

WAIT = f"""\
command -v perl >/dev/null 2>&1 || exit 1
for port in /sys/class/virtio-ports/*; do
  name=
  {{ read -r name <"$port/name"; }} 2>/dev/null
  [ "$name" != {PORT} ] || exec setsid perl -e {shlex.quote(_PERL)} "/dev/${{port##*/}}" </dev/null >/dev/null 2>&1 &
done
"""
"""For `sh`: leaves the process that waits, which tells on the port what it holds open, a line each, and `HELLO`."""

_WRITE, _IOCTL, _KILL, _TRUNCATE, _SET_CLOCK = 1, 16, 62, 77, 227
_RNDADDENTROPY, _RNDRESEEDCRNG, _SIOCSIFHWADDR = 0x40085203, 0x5207, 0x8924
_ETHERNET, _HUP, _CLOCK_REALTIME = 1, 1, 0


class Calls:
    """What one fork is told: system calls, with a word for what each is good for; none for those that may fail."""

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._good_for: list[str] = []

    def add(self, good_for: str, what: int, file: int, number: int = 0, data: bytes = b"") -> None:
        """`data` goes where the call wants a pointer: last for an ioctl, else before `number`."""
        self._records.append(b"%4d%6d%12d%6d%b" % (what, file, number, len(data), data))
        self._good_for.append(good_for)

    def put(self, good_for: str, file: int, size: int | None, text: bytes) -> None:
        """All that a file holds from now on, which has this size. What fits is written over what is there: making a
        file empty first is a lot of the guest's file system. None: the one that waits is of an older version, which
        writes at the end."""
        if size is None:
            self.add(good_for, _TRUNCATE, file)
        self.add(good_for, _WRITE, file, len(text), text)
        if size is not None and size > len(text):
            self.add(good_for, _TRUNCATE, file, len(text))

    def message(self) -> bytes:
        """What is written to the port."""
        text = b"".join(self._records)
        return b"%8d%b" % (8 + len(text), text)

    def answer(self, text: str) -> str:
        """What came back, with words instead of numbers."""
        lines = []
        for line in text.splitlines():
            number, blank, why = line.partition(" ")
            if blank and number.isdigit() and int(number) < len(self._good_for):
                if not (good_for := self._good_for[int(number)]):
                    continue
                line = f"{good_for}: {why}"
            lines.append(line)
        return "".join(f"{line}\n" for line in lines)


def calls(told: Sequence[str], who: Rebirth) -> Calls:
    """What makes somebody else of a guest in which a process waits that has `told` what it holds open."""
    held = _read(told)
    made, new = Calls(), dict(who.nics)
    noise = pack("ii", 8 * len(who.seed), len(who.seed)) + who.seed
    for file, _, _ in held.get("pool", ()):
        made.add("the random pool", _IOCTL, file, _RNDADDENTROPY, noise)
        made.add("the random pool", _IOCTL, file, _RNDRESEEDCRNG, bytes(8))
    for what, text in (
        ("name", f"{who.name}\n"), ("machine-id", f"{who.machine_id}\n"),
        ("private", f"{who.host_key.private.strip()}\n"), ("public", f"{who.host_key.public.strip()}\n"),
    ):  # fmt: skip
        for file, size, _ in held.get(what, ()):
            made.put(_FILES[what], file, size, text.encode())
    for file, size, parts in held.get("hosts", ()):
        made.put("/etc/hosts", file, size, f"127.0.1.1 {who.name}".encode().join(parts))
    anew = set()
    for file, size, (before, *_) in held.get("naming", ()):
        after = _renamed(before, new)
        if (old := fixed_card(before)) in new:
            wanted = fixed(new[old], who.places.get(old)).encode()
            if wanted != after:
                anew.add(old)
                after = wanted
        made.put("a file that names a card", file, size, after)
    # From here on other programs notice, and have work to do.
    for file, _, (nic, mac, *_) in sorted(held.get("card", ()), key=lambda card: card[2]):
        if mine := new.get(old := mac.decode(errors="replace")):
            hardware = pack("16sH6s16x", nic, _ETHERNET, bytes.fromhex(mine.replace(":", "")))
            made.add(f"the MAC address of {nic.decode(errors='replace')}", _IOCTL, file, _SIOCSIFHWADDR, hardware)
            place = who.places.get(old)
            if place and (place != NAT or old in anew):
                made.add("", _SETTLE, 0, 0, b"%b,%b" % (nic, _words(place).encode()))
    for file, _, _ in held.get("called", ()):
        made.add("the hostname", _WRITE, file, len(who.name), who.name.encode())
    now = pack("qq", int(who.seconds), int(who.seconds % 1 * 1e9))
    made.add("the clock", _SET_CLOCK, _CLOCK_REALTIME, 0, now)
    for pid, _, _ in held.get("sshd", ()):
        made.add("", _KILL, pid, _HUP)
    if anew:
        made.add("", _ANEW, 0)
    return made


_FILES = {
    "name": "/etc/hostname",
    "machine-id": "/etc/machine-id",
    "private": "the SSH host key",
    "public": "the SSH host key",
}


_FIELDS = {"naming": 1, "card": 2}
"""Of which kinds there is something to be known besides the descriptor: how many fields."""


def _read(told: Sequence[str]) -> dict[str, list[tuple[int, int | None, list[bytes]]]]:
    """By kind: a descriptor (or a pid), the size of the file in bytes, and what else there is to it. The guest wrote
    it: what makes no sense is left out."""
    held: dict[str, list[tuple[int, int | None, list[bytes]]]] = {}
    for line in told:
        if re.fullmatch(r"[a-z-]+ \d{1,6}( ([0-9a-f]{2})*)*", line):
            kind, file, *fields = line.split(" ")
            more = [bytes.fromhex(field) for field in fields]
            sized = kind != "card" and more and re.fullmatch(rb"[0-9]{1,9}", more[0])  # a card may be called 7
            size = int(more.pop(0)) if sized else None
            if len(more) >= _FIELDS.get(kind, 0):
                held.setdefault(kind, []).append((int(file), size, more))
    return held


def _renamed(text: bytes, new: dict[str, str]) -> bytes:
    """A file's text with each MAC address exchanged for its new one."""
    return re.sub(
        rb"\b..(?::..){5}\b", lambda found: new.get(found[0].decode(errors="replace"), "").encode() or found[0], text
    )


def _words(place: Place) -> str:
    numbers = (place.address, place.address.netmask, place.gateway)
    routes = [each.packed.hex() for route in place.routes for each in route]
    return ",".join(
        [
            *(n.packed.hex() if n else "" for n in numbers), str(place.resolver), place.domain,
            str(place.mtu or ""), *routes,
        ]
    )  # fmt: skip
