"""What a guest's cloud-init reads at its first boot: the four files of a NoCloud seed.

The user's own user-data goes in byte for byte. Everything Innkeeper adds rides in meta-data and vendor-data, which
cloud-init merges beneath user-data: where both set a key, the user's wins.

- meta-data: instance-id, local-hostname, public-keys (cloud-init gives them to the default user).
- vendor-data, a MIME message of
  - a cloud-config: the SSH host key (`ssh_keys`, mappings merge key by key, so a user's own `ssh_keys` add to it),
    the default user's name, the name in /etc/hosts;
  - a boothook: /etc/environment and the guest agent. A boothook and not `write_files` or `runcmd`, because lists do
    not merge: the user's list would silently replace ours;
  - the caller's vendor-data, if any, unchanged.
- network-config, version 2.

Sources: cloud-init's "NoCloud", "Vendor-data", "Merging user-data sections" and "Networking config Version 2"; the
behaviour was checked in the code of cloud-init 22.4.2 (`helpers.ConfigMerger`, `config/cc_ssh.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from innkeeper.base.errors import SeedInvalid
from innkeeper.plan.seed_check import is_mime, validate

__all__ = ["HostKey", "SeedFiles", "compose", "environment_lines", "validate"]

_NO_USER_DATA = "#cloud-config\n{}\n"
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_LINE_LIMIT = 1000
"""Bytes. pam_env (Linux-PAM) reads lines into 1024 bytes and gives up on the whole file at a longer one."""
_SSH_KEY = re.compile(r"(?:[^\s].* )?(?:ssh-|ecdsa-sha2-|sk-ssh-|sk-ecdsa-)[a-z0-9@.-]+ [A-Za-z0-9+/=]{40,}(?: .*)?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_BOUNDARY = "==innkeeper-vendor-data"


@dataclass(frozen=True)
class HostKey:
    """An ed25519 SSH host key: `private` in OpenSSH's own format, `public` one line `ssh-ed25519 AAAA… comment`."""

    private: str = field(repr=False)
    public: str


@dataclass(frozen=True)
class SeedFiles:
    """The text of the four files. They may hold secrets, so `repr` shows none of them."""

    meta_data: str = field(repr=False)
    user_data: str = field(repr=False)
    vendor_data: str = field(repr=False)
    network_config: str = field(repr=False)


def compose(
    *,
    instance_id: str,
    hostname: str,
    user: str | None,
    ssh_keys: Sequence[str],
    host_key: HostKey | None,
    user_data: str | None,
    vendor_data: str | None,
    network_config: str | None,
    env: Mapping[str, str],
    mac: str | None,
) -> SeedFiles:
    """The seed of one guest. A changed `instance_id` makes cloud-init run its first-boot work again.

    `user` renames the image's default user (None: as the image has it). `mac` is the first NIC's, None without a NIC.
    `user_data`, `vendor_data` and `network_config` are taken as they are: call `validate` on each before.
    Raises `SeedInvalid` for a key, variable, user or MAC that cannot work.
    """
    for key in ssh_keys:
        if not _SSH_KEY.fullmatch(key.strip()):
            raise SeedInvalid(
                f"{key[:60]!r} is not an SSH public key",
                hint="pass the one line of a .pub file: ssh-ed25519 AAAA… comment",
                field="ssh_keys",
            )
    if user is not None and not _USER.fullmatch(user):
        raise SeedInvalid(
            f"{user!r} cannot be a user's name in the guest", hint="1-32 of a-z, 0-9, _ and -", field="user"
        )
    meta: dict[str, object] = {"instance-id": instance_id, "local-hostname": hostname}
    if ssh_keys:
        meta["public-keys"] = [key.strip() for key in ssh_keys]
    return SeedFiles(
        meta_data=_yaml(meta),
        user_data=_NO_USER_DATA if user_data is None else user_data,
        vendor_data=_vendor_data(user, host_key, environment_lines(env), vendor_data),
        network_config=_network(mac) if network_config is None else network_config,
    )


def environment_lines(env: Mapping[str, str]) -> list[str]:
    """`env` as lines of /etc/environment, in pam_env's syntax: `NAME="value"`.

    pam_env drops the outer quotes and keeps all inner ones; it knows no escapes, and cuts a line at `#` even between
    quotes (Linux-PAM, `_parse_env_file`). What it cannot carry raises `SeedInvalid`,
    which names the variable and never its value.
    """
    lines = []
    for name, value in sorted(env.items()):
        if not _ENV_NAME.fullmatch(name):
            raise SeedInvalid(
                f"{name!r} cannot be the name of an environment variable",
                hint="letters, digits and _, not beginning with a digit",
                field="env",
            )
        problem = ""
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
            problem = "contains a line end or another control character"
        elif "#" in value:
            problem = "contains '#', where /etc/environment always begins a comment"
        elif len(f'{name}="{value}"'.encode("utf-8", "surrogateescape")) > _ENV_LINE_LIMIT:
            problem = f"is longer than the {_ENV_LINE_LIMIT} bytes that /etc/environment can hold"
        elif any("\ud800" <= char <= "\udfff" for char in value):
            problem = "is not UTF-8"
        if problem:
            raise SeedInvalid(
                f"the value of {name} {problem}", hint="write it to a file of its own with user-data", field="env"
            )
        lines.append(f'{name}="{value}"')
    return lines


def _vendor_data(user: str | None, host_key: HostKey | None, env: list[str], extra: str | None) -> str:
    config: dict[str, object] = {"manage_etc_hosts": "localhost"}  # or sudo cannot resolve its own host
    if user is not None:
        config["user"] = {"name": user}
    if host_key is not None:
        config["ssh_deletekeys"] = True
        config["ssh_keys"] = {"ed25519_private": host_key.private, "ed25519_public": host_key.public}
    parts = [
        _part("cloud-config", "innkeeper.yaml", "#cloud-config\n" + _yaml(config)),
        _part("cloud-boothook", "innkeeper.sh", _boothook(env)),
    ]
    if extra is not None:
        if _BOUNDARY in extra:
            raise SeedInvalid(f"vendor-data may not contain {_BOUNDARY!r}")
        # A MIME message is itself a valid part; in anything else cloud-init looks at the first line.
        parts.append(extra if is_mime(extra) else _part("plain", "vendor-data", extra))
    body = "".join(f"--{_BOUNDARY}\n{part.rstrip(chr(10))}\n\n" for part in parts)
    return f'Content-Type: multipart/mixed; boundary="{_BOUNDARY}"\nMIME-Version: 1.0\n\n{body}--{_BOUNDARY}--\n'


def _part(subtype: str, name: str, text: str) -> str:
    """8bit, not base64: NoCloud is a file and 8-bit clean, and the seed stays readable."""
    return (
        f'Content-Type: text/{subtype}; charset="utf-8"\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n'
        f'Content-Disposition: attachment; filename="{name}"\n\n{text}'
    )


# A boothook runs early at every boot, so this replaces what it wrote before. The here-document is quoted: nothing in it
# is expanded, and no line of it can be the delimiter, since each begins with a variable's name.
_ENVIRONMENT = r"""begin='# innkeeper: begin' end='# innkeeper: end'
touch /etc/environment
sed "/^$begin\$/,/^$end\$/d" /etc/environment >/etc/environment.innkeeper || exit 1
cat >>/etc/environment.innkeeper <<'# innkeeper: end of text'
# innkeeper: begin
@ENVIRONMENT@
# innkeeper: end
# innkeeper: end of text
chmod 0644 /etc/environment.innkeeper
mv -f /etc/environment.innkeeper /etc/environment
"""

# udev starts the agent on Debian; elsewhere it may be installed and not enabled.
_AGENT = """if [ -d /run/systemd/system ] && [ -e /dev/virtio-ports/org.qemu.guest_agent.0 ]; then
  systemctl start --no-block qemu-guest-agent.service 2>/dev/null
fi
exit 0
"""


def _boothook(env: list[str]) -> str:
    environment = _ENVIRONMENT.replace("@ENVIRONMENT@", "\n".join(env)) if env else ""
    return f"#cloud-boothook\n#!/bin/sh\n{environment}{_AGENT}"


def _network(mac: str | None) -> str:
    """DHCPv4 on the NIC with this MAC; IPv6 as router advertisements say.

    No `dhcp6`: ifupdown would wait a minute for a server that most networks lack, while systemd-networkd asks DHCPv6 by
    itself when the router says so. Not `optional` either: first-boot package installs need a network that is up.
    `set-name` because the ifupdown renderer knows no matching by MAC.
    """
    if mac is None:
        return _yaml({"network": {"config": "disabled"}})
    if not _MAC.fullmatch(mac):
        raise SeedInvalid(f"{mac!r} is not a MAC address", field="mac")
    nic = {"match": {"macaddress": mac.lower()}, "set-name": "eth0", "dhcp4": True, "dhcp6": False}
    return _yaml({"version": 2, "ethernets": {"eth0": nic}})


def _yaml(document: Mapping[str, object]) -> str:
    return yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1 << 30
    )


class _Dumper(yaml.SafeDumper):
    """Multi-line text as a literal block, so that keys in a seed can be read."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
