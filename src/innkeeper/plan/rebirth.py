"""What a fork's guest is told, so that it becomes a machine of its own.

Everything a guest copies with its memory and disk and must not share: hostname, machine-id, SSH host keys, MAC
addresses, the random pool, and a clock that stands at the moment of the capture.

Where the guest has Perl, as Debian and Ubuntu always do, a process that was started before the capture waits for this
on a port of its own. It has been compiled, and Perl's system calls need no program to be started: under software
emulation each start takes dozens of milliseconds. Elsewhere, and where a daemon died in between, the agent runs a
shell script.

machine-id(5); random(4): RNDADDENTROPY credits what it is given, RNDRESEEDCRNG uses it at once, while what is only
written to /dev/urandom is used up to a minute later; netdevice(7): SIOCSIFHWADDR; sshd(8): SIGHUP makes it read its
keys again; linux/route.h: SIOCDELRT, SIOCADDRT; disable_ipv6 of ip-sysctl.rst makes the kernel forget addresses and ask
for a router again. System call numbers are those of x86-64, as the machines are. No link is taken down meanwhile:
systemd-networkd would look for its configuration again, by the MAC address that it has read there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from uuid import UUID

from innkeeper.plan.seed import HostKey

PORT = "org.innkeeper.rebirth.0"
HELLO, DONE, NOTE = "innkeeper-waits", "innkeeper-done", "note: "
"""The first line, the last one of question and answer, and how a line begins that is no complaint."""


@dataclass(frozen=True)
class Place:
    """What DHCP would say to a card: its address in its network, where the way out is (None where there is none), and
    who knows the names."""

    address: IPv4Interface
    gateway: IPv4Address | None
    resolver: IPv4Address
    domain: str
    mtu: int | None = None
    routes: tuple[tuple[IPv4Address, IPv4Address], ...] = ()
    """(host, next hop) of what is reached otherwise than by the gateway."""


@dataclass(frozen=True)
class Rebirth:
    """Who the guest becomes. `nics` are (old, new) MAC addresses, `places` of those in a network of ours, by old MAC;
    `seed` is random, `seconds` the time of day (Unix time)."""

    name: str
    machine_id: str
    host_key: HostKey
    nics: Sequence[tuple[str, str]]
    seed: bytes
    seconds: float
    places: Mapping[str, Place] = field(default_factory=dict)


PREPARE = """\
for key in /etc/ssh/ssh_host_*_key; do
  case "$key" in *'*'*|*_ed25519_key) ;; *) rm -f "$key" "$key.pub" ;; esac
done
if systemctl -q is-active ssh.service && systemctl -q cat ssh.socket && [ "$(sshd -T | grep -c '^port 22$')" = 1 ]; then
  systemctl stop ssh.service && systemctl start ssh.socket
fi >/dev/null 2>&1
sync
"""
"""Before the capture: of the host keys only the one stays that each fork gets its own of. Where systemd can listen for
sshd, it starts one when somebody comes, with the keys of then; else the one that runs has to read them again."""

CONFIGURATIONS = ("/etc/systemd/network", "/etc/netplan", "/etc/network", "/etc/network/interfaces.d")
"""Folders of files that may tell a card by its MAC address, as cloud-init writes them."""

_PERL = rf"""
# Whatever can be done before the capture is done before: each fork pays for the rest.
my @said;
local $SIG{{__WARN__}} = sub {{ push @said, @_ }};
sub get {{
  my ($from, $text) = (undef, "");
  open($from, "<", $_[0]) and sysread($from, $text, 65536);
  $text;
}}
sub ready {{
  my ($file, $mode, $mask) = @_;
  my $before = umask($mask // 022);
  my $to;
  open($to, $mode, $file) or warn "$file: $!\n";
  umask($before);
  $to;
}}
sub put {{
  my ($to, $text) = @_;
  truncate($to, 0) && syswrite($to, $text) or warn "a file: $!\n";
}}
sub files {{
  my ($folder) = @_;
  opendir(my $all, $folder) or return;
  grep {{ -f }} map {{ "$folder/$_" }} readdir $all;
}}
my $pool = ready("/dev/urandom", "+<");
my $now_called = ready("/proc/sys/kernel/hostname", "+<");
my $called = ready("/etc/hostname", "+>>");
my @machine_ids = map {{ -f && !-l ? ready($_, "+>>") : () }} "/etc/machine-id", "/var/lib/dbus/machine-id";
my @hosts = split(/^127\.0\.1\.1.*/m, get("/etc/hosts"), -1);
my $hosts = @hosts > 1 && ready("/etc/hosts", "+>>");
my $key = "/etc/ssh/ssh_host_ed25519_key";
my ($private, $public) = -d "/etc/ssh" ? (ready($key, "+>>", 077), ready("$key.pub", "+>>")) : ();
my ($sshd) = get("/run/sshd.pid") =~ /^(\d+)/;
my $resolvers = -f "/etc/resolv.conf" && !-l "/etc/resolv.conf" && ready("/etc/resolv.conf", "+>>");
socket(my $any, 2, 2, 0);
opendir(my $nics, "/sys/class/net");
my %nic_with = map {{ get("/sys/class/net/$_/address") =~ /(.+)/ ? ($1 => $_) : () }} grep {{ !/^\./ }} readdir $nics;
my $switch = "/proc/sys/net/ipv6/conf/%s/disable_ipv6";
my %ipv6 = map {{ get(sprintf $switch, $_) =~ /^0/ ? ($_ => ready(sprintf($switch, $_), "+<")) : () }} values %nic_with;
my @naming = map {{
  my ($file, $text) = ($_, get($_));
  (grep {{ index($text, $_) >= 0 }} keys %nic_with) ? [ready($file, "+>>"), $text] : ();
}} map {{ files($_) }} qw({" ".join(CONFIGURATIONS)});
sub card {{
  my ($nic, $what, $request) = @_;
  ioctl($any, $what, $request) or warn "$nic: $!\n";
}}
sub route {{
  my ($nic, $to, $hop, $flags) = @_;
  my $way = "x8 S x2 a4 x8 S x2 a4 x8 S x14 S x30 p x24";
  $way = pack($way, 2, pack("H*", $to), 2, pack("H*", $hop), 2, $flags, $nic);
  # Another card of the same network may have made it: EEXIST.
  ioctl($any, 0x890b, $way) || $! == 17 or warn "$nic: $!\n";
}}
sub settle {{
  my ($nic, $address, $mask, $gateway, $resolver, $domain, $mtu, @hosts) = @_;
  card($nic, 0x8922, pack("a16 i x20", $nic, $mtu)) if $mtu;
  my $default = pack("x8 S x14 S x14 S x14 S x30 p x24", 2, 2, 2, 1, $nic);
  1 while ioctl($any, 0x890c, $default);
  for my $set ([0x8916, $address], [0x891c, $mask]) {{
    card($nic, $set->[0], pack("a16 S x2 a4 x16", $nic, 2, pack("H*", $set->[1])));
  }}
  route($nic, "0" x 8, $gateway, 3) if $gateway;
  while (my ($host, $hop) = splice(@hosts, 0, 2)) {{ route($nic, $host, $hop, 7) }}
  if (my $off = $ipv6{{$nic}}) {{ sysseek($off, 0, 0) && syswrite($off, $_) for 1, 0 }}
  put($resolvers, "search $domain\nnameserver $resolver\n") if $resolvers;
}}
sub reborn {{
  my %who = @_;
  my $noise = pack("H*", $who{{seed}});
  $noise = pack("ii", 8 * length $noise, length $noise) . $noise;
  ioctl($pool, 0x40085203, $noise) && ioctl($pool, 0x5207, 0) or warn "the random pool: $!\n";
  put($called, "$who{{name}}\n");
  put($_, "$who{{machine_id}}\n") for @machine_ids;
  put($hosts, join("127.0.1.1 $who{{name}}", @hosts)) if $hosts;
  for my $each (@naming) {{
    my ($to, $text) = @$each;
    $text =~ s/\b(..(?::..){{5}})\b/$who{{$1}} || $1/ge;
    put($to, $text);
  }}
  if ($private) {{
    put($private, pack("H*", $who{{private}}));
    put($public, pack("H*", $who{{public}}));
  }}
  # From here on other programs notice, and have work to do.
  for my $old (sort {{ $nic_with{{$a}} cmp $nic_with{{$b}} }} keys %nic_with) {{
    my $mac = $who{{$old}} or next;
    my $nic = $nic_with{{$old}};
    card($nic, 0x8924, pack("a16 S a22", $nic, 1, pack("H*", $mac =~ tr/://dr)));
    settle($nic, split(/,/, $who{{"$old,place"}})) if $who{{"$old,place"}};
  }}
  syswrite($now_called, $who{{name}}) or warn "the hostname: $!\n";
  my $now = pack("qq", $who{{seconds}}, $who{{microseconds}});
  syscall(164, $now, 0) == 0 or warn "the clock: $!\n";
  kill("HUP", $sshd) if $sshd;
}}
open(my $port, "+<", $ARGV[0]) or exit 1;
syswrite($port, "{HELLO}\n");
my $text = "";
until ($text =~ s/^{DONE}\n\z//m) {{ sysread($port, $text, 65536, length $text) or exit 1 }}
eval {{ reborn(split /[ \n]/, $text); 1 }} or push @said, $@;
syswrite($port, join("", @said) . "{DONE}\n");
"""

WAIT = f"""\
command -v perl >/dev/null 2>&1 || exit 1
for port in /sys/class/virtio-ports/*; do
  name=
  {{ read -r name <"$port/name"; }} 2>/dev/null
  [ "$name" != {PORT} ] || exec setsid perl -e {shlex.quote(_PERL)} "/dev/${{port##*/}}" </dev/null >/dev/null 2>&1 &
done
"""
"""For `sh`: leaves the process that waits, which says `HELLO` on the port."""


def state_with(state: bytes, nics: Sequence[tuple[str, str]]) -> bytes:
    """The captured state of the devices with each old MAC address exchanged for its new one, of the same length.

    It is in the NIC, and in what user-mode networking remembers of whom it leased an address to: the fork then keeps
    the address that its ports are forwarded to.
    """
    for old, new in nics:
        state = state.replace(bytes.fromhex(old.replace(":", "")), bytes.fromhex(new.replace(":", "")))
    return state


def forms(uuid: str) -> list[bytes]:
    """How a machine's UUID stands in its guest's memory: as the firmware's tables have it (SMBIOS 2.6, 7.2.1: the first
    three fields little-endian), and as kernels and programs have written it down."""
    value = UUID(uuid)
    return [value.bytes_le, str(value).encode(), str(value).upper().encode()]


def words(who: Rebirth) -> str:
    """What is written to the port: names and values in turn, none of which has a blank in it."""
    told = {
        "name": who.name,
        "machine_id": who.machine_id,
        "seconds": int(who.seconds),
        "microseconds": int(who.seconds % 1 * 1e6),
        "seed": who.seed.hex(),
        "private": _line(who.host_key.private).hex(),
        "public": _line(who.host_key.public).hex(),
        **dict(who.nics),
        **{f"{old},place": _told(place) for old, place in who.places.items()},
    }
    return "".join(f"{name} {value}\n" for name, value in told.items()) + DONE + "\n"


def _told(place: Place) -> str:
    numbers = (place.address, place.address.netmask, place.gateway)
    routes = [each.packed.hex() for route in place.routes for each in route]
    return ",".join(
        [
            *(n.packed.hex() if n else "" for n in numbers), str(place.resolver), place.domain,
            str(place.mtu or ""), *routes,
        ]
    )  # fmt: skip


def _line(text: str) -> bytes:
    return f"{text.strip()}\n".encode()


def reseed(seed: bytes) -> str:
    """For `sh`, as root: random numbers that nobody has had before, also where the kernel has no driver for vmgenid."""
    noise = "".join(f"\\{byte:03o}" for byte in seed)
    return f"""\
printf '{noise}' >/dev/urandom
[ -d /sys/bus/acpi/drivers/vmgenid ] ||
  perl -e 'open($p, "<", "/dev/urandom"); ioctl($p, 0x5207, 0) or die' 2>/dev/null ||
  echo "{NOTE}for up to a minute, random numbers may be those of the captured guest"
"""


def shell_script(who: Rebirth) -> str:
    """For `sh`, as root; what it prints is a complaint, unless it is a `NOTE`, or `DONE` at the end. Steps that do not
    apply to the guest are left out by it. Only what the shell has built in is used wherever that is possible."""
    macs = "".join(f"{old}) new={new} {_shell_words(who.places.get(old))};; " for old, new in who.nics)
    return f"""\
date -u -s @{who.seconds:.0f} >/dev/null
{reseed(who.seed)}name={shlex.quote(who.name)}
read -r old </proc/sys/kernel/hostname
echo "$name" >/proc/sys/kernel/hostname
echo "$name" >/etc/hostname
if [ -f /etc/machine-id ]; then
  echo {who.machine_id} >/etc/machine-id
  if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
    echo {who.machine_id} >/var/lib/dbus/machine-id
  fi
fi
if [ -f /etc/hosts ]; then
  hosts=
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in "127.0.1.1"*) line="127.0.1.1 $name" ;; esac
    hosts="$hosts$line
"
  done </etc/hosts
  printf %s "$hosts" >/etc/hosts
fi
for nic in /sys/class/net/*; do
  new=
  {{ read -r mac <"$nic/address"; }} 2>/dev/null || continue
  case "$mac" in {macs}*) ;; esac
  [ -n "$new" ] || continue
  nic=${{nic##*/}}
  ip link set dev "$nic" address "$new"
  for file in {" ".join(f"{folder}/*" for folder in CONFIGURATIONS)}; do
    if [ -f "$file" ] && grep -q "$mac" "$file"; then sed -i "s/$mac/$new/g" "$file"; fi
  done
  [ -n "$at" ] || continue
  [ -z "$mtu" ] || ip link set dev "$nic" mtu "$mtu"
  ip -4 route flush dev "$nic"
  ip -4 addr flush dev "$nic"
  ip addr add "$at" brd + dev "$nic"
  [ -z "$gateway" ] || ip route replace default via "$gateway" dev "$nic"
  for route in $routes; do ip route replace "${{route%,*}}" via "${{route#*,}}" dev "$nic"; done
  switch=/proc/sys/net/ipv6/conf/$nic/disable_ipv6
  if [ "$(cat "$switch" 2>/dev/null)" = 0 ]; then echo 1 >"$switch"; echo 0 >"$switch"; fi
  [ -L /etc/resolv.conf ] || echo "search $domain
nameserver $resolver" >/etc/resolv.conf
done
if [ -d /etc/ssh ]; then
  umask 077
  echo {shlex.quote(who.host_key.private.strip())} >/etc/ssh/ssh_host_ed25519_key
  umask 022
  echo {shlex.quote(who.host_key.public.strip())} >/etc/ssh/ssh_host_ed25519_key.pub
  {{ read -r sshd </run/sshd.pid && kill -HUP "$sshd"; }} 2>/dev/null
fi
echo {DONE}
exit 0
"""


def _shell_words(place: Place | None) -> str:
    if place is None:
        return "at="
    way = f"at={place.address} gateway={place.gateway or ''}"
    routes = shlex.quote(" ".join(f"{host},{hop}" for host, hop in place.routes))
    return f"{way} resolver={place.resolver} domain={shlex.quote(place.domain)} mtu={place.mtu or ''} routes={routes}"


def understood(answer: str) -> tuple[list[str], list[str]]:
    """(notes, complaints) of what a script printed; one that did not come to its end is a complaint."""
    lines = [line for line in answer.splitlines() if line.strip()]
    notes = [line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)]
    wrong = [line for line in lines if not line.startswith(NOTE) and line != DONE]
    return notes, wrong if DONE in lines else [*wrong, "it did not come to its end"]
