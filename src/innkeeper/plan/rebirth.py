"""What a fork's guest is told, so that it becomes a machine of its own: a shell script for its agent.

Everything a guest copies with its memory and disk and must not share: hostname, machine-id, SSH host keys, MAC
addresses, the random pool, and a clock that stands at the moment of the capture. Under software emulation each program
that a script starts costs several milliseconds, so it keeps to what the shell has built in wherever that is possible.

machine-id(5); random(4): what is written to /dev/urandom is mixed in; sshd(8): SIGHUP makes it read its keys again.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from innkeeper.plan.seed import HostKey


@dataclass(frozen=True)
class Rebirth:
    """Who the guest becomes. `nics` are (old, new) MAC addresses; `seed` is random, `seconds` the time of day (Unix
    time)."""

    name: str
    machine_id: str
    host_key: HostKey
    nics: Sequence[tuple[str, str]]
    seed: bytes
    seconds: float


PREPARE = """\
for key in /etc/ssh/ssh_host_*_key; do
  case "$key" in *'*'*|*_ed25519_key) ;; *) rm -f "$key" "$key.pub" ;; esac
done
sync
"""
"""Before the capture: of the host keys only the one stays that each fork gets its own of."""


def script(who: Rebirth) -> str:
    """For `sh`, as root; what it prints is a complaint. Steps that do not apply to the guest are left out by it."""
    noise = "".join(f"\\{byte:03o}" for byte in who.seed)
    macs = "".join(f"{old}) new={new};; " for old, new in who.nics)
    return f"""\
date -u -s @{who.seconds:.2f} >/dev/null 2>&1 || date -u -s @{who.seconds:.0f} >/dev/null
printf '{noise}' >/dev/urandom
name={shlex.quote(who.name)}
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
  [ -z "$new" ] || ip link set dev "${{nic##*/}}" address "$new"
done
if [ -d /etc/ssh ]; then
  umask 077
  echo {shlex.quote(who.host_key.private.strip())} >/etc/ssh/ssh_host_ed25519_key
  umask 022
  echo {shlex.quote(who.host_key.public.strip())} >/etc/ssh/ssh_host_ed25519_key.pub
  {{ read -r sshd </run/sshd.pid && kill -HUP "$sshd"; }} 2>/dev/null
fi
exit 0
"""
