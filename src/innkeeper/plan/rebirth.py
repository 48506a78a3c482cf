"""What a fork's guest is told, so that it becomes a machine of its own.

Everything a guest copies with its memory and disk and must not share: hostname, machine-id, SSH host keys, MAC
addresses, the random pool, and a clock that stands at the moment of the capture.

A process that was started before the capture does it, where there is one (plan/waiting.py); elsewhere, and where a
daemon died in between, the agent runs a shell script.

machine-id(5); random(4): RNDADDENTROPY credits what it is given, RNDRESEEDCRNG uses it at once, while what is only
written to /dev/urandom is used up to a minute later; sshd(8): SIGHUP makes it read its keys again; disable_ipv6 of
ip-sysctl.rst makes the kernel forget addresses and ask for a router again. No link is taken down meanwhile:
systemd-networkd would look for its configuration again, by the MAC address that it has read there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from uuid import UUID

from innkeeper.plan.seed import HostKey

DONE, NOTE = "innkeeper-done", "note: "
"""The last line of an answer, and how a line begins that is no complaint."""


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


NAT = Place(IPv4Interface("10.0.2.15/24"), IPv4Address("10.0.2.2"), IPv4Address("10.0.2.3"), "")
"""What QEMU's own NAT says to every guest."""


@dataclass(frozen=True)
class Rebirth:
    """Who the guest becomes. `nics` are (old, new) MAC addresses, `places` of those of which it is known, by old MAC;
    `seed` is random, `seconds` the time of day (Unix time)."""

    name: str
    machine_id: str
    host_key: HostKey
    nics: Sequence[tuple[str, str]]
    seed: bytes
    seconds: float
    places: Mapping[str, Place] = field(default_factory=dict)


NETWORKD, FIXED = "/run/systemd/network", "innkeeper.conf"
FIXED_FILES = f"{NETWORKD}/*.d/{FIXED}"
"""What `before_capture` leaves to systemd-networkd, until the guest boots."""

ASK_AGAIN = f"""\
set -- {FIXED_FILES}
[ ! -f "$1" ] || {{ rm -f "$@"; networkctl reload; }}
"""
"""For `sh`: systemd-networkd asks DHCP again, as anybody wants whose card leads elsewhere now."""


def fixed(mac: str, place: Place | None) -> str:
    """A drop-in of systemd.network(5) with which a card does not ask DHCP what its place is; without a place, one with
    which it asks. Its first line tells the card (`fixed_card`)."""
    first = f"# Innkeeper: {mac}"
    if place is None:
        return f"{first}\n"
    return "\n".join(
        [
            first,
            "[Network]",
            "DHCP=no",
            "KeepConfiguration=static",  # what is there already is right, and stays meanwhile
            f"Address={place.address}",
            *([f"Gateway={place.gateway}"] if place.gateway else []),
            f"DNS={place.resolver}",
            *([f"Domains={place.domain}"] if place.domain else []),
            *([f"[Link]\nMTUBytes={place.mtu}"] if place.mtu else []),
            *(f"[Route]\nDestination={host}\nGateway={hop}" for host, hop in place.routes),
            "",
        ]
    )


def fixed_card(text: bytes) -> str:
    """The MAC address that a file like that tells; of another file, nothing."""
    found = re.match(rb"# Innkeeper: ([0-9a-f:]{17})\n", text)
    return found[1].decode() if found else ""


SETTLES = 5
"""Seconds in which a guest comes to rest: what is under way at the capture, every fork does."""
_FORGET_KEYS = """\
for key in /etc/ssh/ssh_host_*_key; do
  case "$key" in *'*'*|*_ed25519_key) ;; *) rm -f "$key" "$key.pub" ;; esac
done
if systemctl -q is-active ssh.service && systemctl -q cat ssh.socket && [ "$(sshd -T | grep -c '^port 22$')" = 1 ]; then
  systemctl stop ssh.service && systemctl start ssh.socket
fi >/dev/null 2>&1
"""
"""Of the host keys only the one stays that each fork gets its own of. Where systemd can listen for sshd, it starts one
when somebody comes, with the keys of then; else the one that runs has to read them again."""


TIME_LATER = 10
"""Minutes after which a guest asks for the time of day."""
_TIME_LATER = f"""\
if systemctl -q is-active systemd-timesyncd.service; then
  systemctl stop systemd-timesyncd.service
  systemd-run --on-active={TIME_LATER}min systemctl start systemd-timesyncd.service
fi >/dev/null 2>&1
"""
"""A fork is told the time by its host. Its systemd-timesyncd would notice that and ask the Internet at once, as would
those of all other forks; with the resolver that it asks first, that is a tenth of what an idle Debian takes."""


def before_capture(nat: Sequence[str]) -> str:
    """For `sh`, as root, before the capture. `nat` are the MAC addresses of cards of QEMU's own NAT, where each guest
    has the same address: systemd-networkd would ask for it again in every fork, because of the MAC, and all that watch
    it would follow. That is half of what a Debian does in its first second."""
    return f"""\
{_FORGET_KEYS}{_TIME_LATER}fixed=
for nic in /sys/class/net/*; do
  mac=$(cat "$nic/address")
  nic=${{nic##*/}}
  case " {" ".join(nat)} " in *" $mac "*) ;; *) continue ;; esac
  ip -4 -o addr show dev "$nic" dynamic | grep -q " {NAT.address} " || continue
  file=$(networkctl status "$nic" | sed -n 's/^ *Network File: //p')
  [ -f "$file" ] || continue
  mkdir -p "{NETWORKD}/${{file##*/}}.d"
  cat >"{NETWORKD}/${{file##*/}}.d/{FIXED}" <<END
{fixed("$mac", NAT)}END
  fixed=$nic
done 2>/dev/null
[ -z "$fixed" ] || {{ networkctl reload; sleep {SETTLES}; }}
sync
"""


CONFIGURATIONS = ("/etc/systemd/network", "/etc/netplan", "/etc/network", "/etc/network/interfaces.d")
"""Folders of files that may tell a card by its MAC address, as cloud-init writes them."""


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
    macs = "".join(f"{old}) new={new} {_shell_words(new, who.places.get(old))};; " for old, new in who.nics)
    return f"""\
date -u -s @{who.seconds:.0f} >/dev/null
{reseed(who.seed)}name={shlex.quote(who.name)} again=
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
  for file in {" ".join(f"{folder}/*" for folder in CONFIGURATIONS)} {FIXED_FILES}; do
    {{ [ -f "$file" ] && grep -q "$mac" "$file"; }} || continue
    sed -i "s/$mac/$new/g" "$file"
    case "$file" in {FIXED_FILES}) [ "$(cat "$file")" != "$fixed" ] || continue ;; *) continue ;; esac
    echo "$fixed" >"$file"
    stays= again=yes
  done
  [ -n "$at" ] && [ -z "$stays" ] || continue
  [ -z "$mtu" ] || ip link set dev "$nic" mtu "$mtu"
  ip -4 route flush dev "$nic"
  ip -4 addr flush dev "$nic"
  ip addr add "$at" brd + dev "$nic"
  [ -z "$gateway" ] || ip route replace default via "$gateway" dev "$nic" proto static
  for route in $routes; do ip route replace "${{route%,*}}" via "${{route#*,}}" dev "$nic" proto static; done
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
[ -z "$again" ] || networkctl reload >/dev/null 2>&1
echo {DONE}
exit 0
"""


def _shell_words(mac: str, place: Place | None) -> str:
    text = f"fixed={shlex.quote(fixed(mac, place).strip())}"
    if place is None:
        return f"{text} at="
    way = f"{text} stays={'yes' if place == NAT else ''} at={place.address} gateway={place.gateway or ''}"
    routes = shlex.quote(" ".join(f"{host},{hop}" for host, hop in place.routes))
    return f"{way} resolver={place.resolver} domain={shlex.quote(place.domain)} mtu={place.mtu or ''} routes={routes}"


def understood(answer: str) -> tuple[list[str], list[str]]:
    """(notes, complaints) of what a script printed; one that did not come to its end is a complaint."""
    lines = [line for line in answer.splitlines() if line.strip()]
    notes = [line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)]
    wrong = [line for line in lines if not line.startswith(NOTE) and line != DONE]
    return notes, wrong if DONE in lines else [*wrong, "it did not come to its end"]
