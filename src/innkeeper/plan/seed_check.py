"""Whether cloud-init will understand a file of the seed, told before the guest boots and with the line.

Errors are what cloud-init rejects or silently drops; warnings are what is probably not meant. Nothing is rewritten.
A template (`## template: jinja`) is only looked at as text, since its YAML exists inside the guest only.

Source of the first lines: cloud-init's "User-data formats"; of the keys and their types: its schema
(schema-cloud-config-v1.json) and the "Networking config" pages for versions 1 and 2.
"""

from __future__ import annotations

import difflib
import email
import json
import re
from collections.abc import Iterator
from typing import Literal, NoReturn

import yaml
import yaml.reader

from innkeeper.base.errors import SeedInvalid
from innkeeper.base.units import MIB, format_size

Kind = Literal["user-data", "vendor-data", "meta-data", "network-config"]

SIZE_LIMIT = 1 * MIB
"""Bytes of one file. NoCloud itself has no limit; this one bounds what a daemon parses for a stranger."""

DEPTH_LIMIT = 100
"""Lists and mappings inside each other."""

_FIRST_LINES = {  # as cloud-init compares them: lower case, after leading white space, longest first
    "#cloud-config-archive": "archive",
    "#cloud-config-jsonp": "jsonp",
    "## template: jinja": "template",
    "#cloud-boothook": "script",
    "#include-once": "include",
    "#part-handler": "script",
    "#cloud-config": "config",
    "#include": "include",
    "#!": "script",
}

_SHAPES = {
    "mapping": "ansible apt autoinstall ca-certs ca_certs chef chpasswd device_aliases disk_setup drivers fan growpart "
    "grub-dpkg grub_dpkg keyboard landscape lxd mcollective phone_home power_state puppet random_seed reporting "
    "resolv_conf rh_subscription rsyslog salt_minion snap spacewalk ssh ssh_keys ssh_publish_hostkeys swap "
    "ubuntu_advantage ubuntu_pro updates vendor_data yum_repos zypper apk_repos",
    "list": "bootcmd cloud_config_modules cloud_final_modules cloud_init_modules fs_setup mount_default_fields mounts "
    "packages runcmd ssh_authorized_keys ssh_fp_console_blacklist ssh_genkeytypes ssh_import_id "
    "ssh_key_console_blacklist write_files",
    "true or false": "allow_public_ssh_keys apt_reboot_if_required apt_update apt_upgrade disable_ec2_metadata "
    "disable_root manage_resolv_conf migrate no_ssh_fingerprints package_reboot_if_required package_update "
    "package_upgrade prefer_fqdn_over_hostname preserve_hostname ssh_deletekeys ssh_quiet_keygen "
    "create_hostname_file",
    "text": "authkey_hash byobu_by_default disable_root_opts final_message fqdn hostname locale locale_configfile "
    "password timezone yum_repo_dir",
    "anything": "apt_pipelining datasource datasource_list debug groups instance-id launch-index local-hostname "
    "manage_etc_hosts merge_how merge_type network ntp output public-keys resize_rootfs ssh_pwauth syslog_fix_perms "
    "system_info user users wireguard output version",
}
_KEYS = {key: shape for shape, keys in _SHAPES.items() for key in keys.split()}
_NETWORK_V1_TYPES = ("physical", "bond", "bridge", "vlan", "nameserver", "route", "loopback", "infiniband")
_NETWORK_V2_SECTIONS = ("ethernets", "bonds", "bridges", "vlans", "wifis", "tunnels", "dummy-devices", "vrfs", "modems")

# libyaml's parser where PyYAML was built with it: ten times as fast, same positions.
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def validate(kind: Kind, text: str | bytes, filename: str) -> list[str]:
    """Warnings about one file of the seed, each with its line; none if it is fine.

    Accepted user-data and vendor-data: `#cloud-config`, `#!` scripts, MIME messages, `#include`, `#cloud-boothook`,
    `#part-handler`, cloud-config archives and JSON patches, and jinja templates; not gzip, which a seed does not need.
    Raises `SeedInvalid` with `facts` file, line and column (both from 1) for what the guest would reject.
    """
    check = _Check(filename)
    text = check.decode(text)
    if kind == "network-config":
        check.network(check.tree(text))
    elif kind == "meta-data":
        check.meta(check.tree(text))
    else:
        check.user_data(text, 0)
    return check.warnings


def is_mime(text: str) -> bool:
    """Whether cloud-init takes this for a MIME message."""
    return "mime-version:" in text[:4096].lower()


class _Check:
    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.warnings: list[str] = []

    def fail(self, line: int, column: int, problem: str, hint: str = "") -> NoReturn:
        """`line` and `column` count from 0 here, as PyYAML's marks do."""
        raise SeedInvalid(
            f"{self.filename}, line {line + 1}, column {column + 1}: {problem}",
            hint=hint,
            file=self.filename,
            line=line + 1,
            column=column + 1,
        )

    def fail_at(self, text: str, offset: int, problem: str, hint: str = "") -> NoReturn:
        before = text[:offset]
        self.fail(before.count("\n"), offset - (before.rfind("\n") + 1), problem, hint)

    def warn(self, line: int, problem: str) -> None:
        self.warnings.append(f"{self.filename}, line {line + 1}: {problem}")

    # --- text ---

    def decode(self, data: str | bytes) -> str:
        size = len(data) if isinstance(data, bytes) else len(data.encode("utf-8", "surrogatepass"))
        if size > SIZE_LIMIT:
            self.fail(0, 0, f"{format_size(size)} is too large", f"at most {format_size(SIZE_LIMIT)}")
        if isinstance(data, bytes):
            if data.startswith(b"\x1f\x8b"):
                self.fail(0, 0, "the file is compressed (gzip)", "pass it uncompressed: a seed has room for it")
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                before = data[: error.start].decode()
                self.fail_at(before, len(before), f"byte 0x{data[error.start]:02x} is not UTF-8", "save it as UTF-8")
        else:
            text = data
        if (found := re.search("[\ud800-\udfff]", text)) is not None:
            self.fail_at(text, found.start(), "the text is not UTF-8", "save it as UTF-8")
        if (nul := text.find("\0")) >= 0:
            self.fail_at(text, nul, "there is a NUL byte", "is this really a text file?")
        if text.startswith("\ufeff"):
            self.fail(
                0, 0, "the file begins with a byte order mark, so cloud-init will not see its first line", "remove it"
            )
        if (end := text.find("\r\n")) >= 0:
            self.warn(text.count("\n", 0, end), "lines end in CRLF, which scripts and files made in the guest may keep")
        return text

    # --- user-data and vendor-data ---

    def user_data(self, text: str, first: int) -> None:
        """`first` is the line in the file that `text` begins at."""
        if is_mime(text):
            return self._mime(text)
        if not text.strip():
            return None
        blank = len(text) - len(text.lstrip())
        start = text[blank : blank + 32].lower()
        form = next((form for line, form in _FIRST_LINES.items() if start.startswith(line)), None)
        body = text[blank:].partition("\n")[2]
        if form == "config":
            self.config(self.tree(text, first), first)
        elif form == "archive":
            node = self.tree(text, first)
            if not isinstance(node, yaml.SequenceNode):
                self.fail(first, 0, "a cloud-config archive must be a list")
        elif form == "jsonp":
            self._json_patch(text, body, first)
        elif form == "include":
            self._include(text, first)
        elif form == "template":
            if body.lstrip()[:13].lower() != "#cloud-config" and not body.lstrip().startswith("#!"):
                self.warn(first + 1, "a template should continue with '#cloud-config' or '#!'")
        elif form is None:
            near = re.match(r"\s*#\s*cloud[-_ ]?config", text, re.IGNORECASE)
            self.fail(
                first,
                0,
                "cloud-init does not know this first line" if near else "the first line does not say what this is",
                "a cloud-config begins with the line '#cloud-config', a script with '#!/bin/sh'",
            )
        return None

    def _mime(self, text: str) -> None:
        message = email.message_from_string(text)
        for part in message.walk():
            if part.defects:
                self.fail(
                    0, 0, f"broken MIME message: {type(part.defects[0]).__name__}", "see cloud-init devel make-mime"
                )
            encoded = str(part.get("Content-Transfer-Encoding", "7bit")).lower() in ("base64", "quoted-printable")
            payload = part.get_payload()
            if part.is_multipart() or encoded or not isinstance(payload, str):
                continue
            offset = text.find(payload)
            line = text.count("\n", 0, offset) if offset > 0 else 0
            if part.get_content_type() == "text/cloud-config":
                self.config(self.tree(payload, line), line)
            elif part.get_content_type() in ("text/plain", "text/x-not-multipart"):
                self.user_data(payload, line)

    def _json_patch(self, text: str, body: str, first: int) -> None:
        try:
            patch = json.loads(body)
        except RecursionError:
            self.fail(first, 0, "nested too deeply")
        except json.JSONDecodeError as error:
            skipped = text.count("\n") - body.count("\n")
            self.fail(first + skipped + error.lineno - 1, error.colno - 1, error.msg)
        if not isinstance(patch, list):
            self.fail(first, 0, "a JSON patch must be a list of operations")

    def _include(self, text: str, first: int) -> None:
        for number, line in enumerate(text.splitlines()):
            url = re.sub(r"^#include(-once)?", "", line.strip()).strip()
            if url and not url.startswith("#") and not re.match(r"(https?|ftp|file)://", url):
                self.warn(first + number, f"{url[:60]!r} is not a URL that cloud-init can read")

    # --- YAML ---

    def tree(self, text: str, first: int = 0) -> yaml.Node | None:
        """The document's node tree, each mapping free of duplicate keys; None for an empty document."""
        if (found := yaml.reader.Reader.NON_PRINTABLE.search(text)) is not None:
            before = text[: found.start()]
            column = len(before) - (before.rfind("\n") + 1)
            self.fail(first + before.count("\n"), column, f"control character {found[0]!r}", "YAML text cannot have it")
        loader = _Loader(text)
        try:
            # libyaml composes by recursion in C, which would end the process: count the depth on flat events first.
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > DEPTH_LIMIT:
                    mark = event.start_mark
                    assert mark is not None
                    self.fail(first + mark.line, mark.column, "nested too deeply")
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line, mark.column) if mark else (0, 0)
            rows = text.split("\n")
            bad = next((n for n in range(line, max(-1, line - 2), -1) if n < len(rows) and _tabbed(rows[n])), None)
            if bad is not None:
                self.fail(first + bad, rows[bad].index("\t"), "indented with a tab", "YAML takes spaces only")
            context = f" ({error.context})" if error.context else ""
            self.fail(first + line, column, f"not valid YAML: {error.problem or 'syntax error'}{context}")
        except yaml.YAMLError as error:
            self.fail(first, 0, f"not valid YAML: {str(error).splitlines()[0]}")
        finally:
            loader.dispose()
        for mapping in _mappings(node):
            seen: dict[str, int] = {}
            for key, _ in mapping.value:
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                    continue
                if key.value in seen:
                    self.fail(
                        first + key.start_mark.line,
                        key.start_mark.column,
                        f"{key.value!r} is there twice",
                        f"first on line {first + seen[key.value] + 1}: only the last one would count",
                    )
                seen[key.value] = key.start_mark.line
        return node

    def config(self, node: yaml.Node | None, first: int = 0) -> None:
        """A cloud-config: known keys have their type, unknown ones are warned about."""
        if node is None or _shape(node) == "empty":
            return
        if not isinstance(node, yaml.MappingNode):
            self.fail(first + node.start_mark.line, 0, f"a cloud-config must be a mapping, this is {_article(node)}")
        for key, value in node.value:
            name, line = str(key.value), first + key.start_mark.line
            if name not in _KEYS:
                close = difflib.get_close_matches(name, _KEYS, 1)
                self.warn(line, f"unknown key {name[:60]!r}" + (f", did you mean {close[0]!r}?" if close else ""))
            elif not _fits(value, _KEYS[name]):
                self._wrong(value, first, name, _KEYS[name])
            elif name in ("runcmd", "bootcmd"):
                self._items(value, first, name, ("text", "list", "empty"), "quote a command that has ': ' in it")
            elif name == "packages":
                self._items(value, first, name, ("text", "list", "mapping"))
            elif name in ("ssh_authorized_keys", "ssh_import_id"):
                self._items(value, first, name, ("text",))
            elif name == "write_files":
                self._items(value, first, name, ("mapping",))
                self._need(value, first, name, "path")
            elif name == "users" and isinstance(value, yaml.SequenceNode):
                self._items(value, first, name, ("mapping", "text", "list"))
                self._need(value, first, name, "name", "snapuser")
                self._user_keys(value, first)
            elif name == "vendor_data" and _member(value, "enabled") in ("false", "False", "no", "off"):
                self.warn(line, "without vendor-data the guest gets no SSH host key and no --env from Innkeeper")

    def _items(self, node: yaml.Node, first: int, name: str, shapes: tuple[str, ...], hint: str = "") -> None:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value, 1):
                if not any(_fits(item, shape) for shape in shapes):
                    self._wrong(
                        item, first, f"item {number} of {name}", " or ".join(s for s in shapes if s != "empty"), hint
                    )

    def _need(self, node: yaml.SequenceNode, first: int, name: str, *keys: str) -> None:
        for number, item in enumerate(node.value, 1):
            if isinstance(item, yaml.MappingNode) and all(_member(item, key) is None for key in (*keys, "<<")):
                line, column = first + item.start_mark.line, item.start_mark.column
                self.fail(line, column, f"item {number} of {name} has no {keys[0]!r}")

    def _user_keys(self, users: yaml.SequenceNode, first: int) -> None:
        for user in users.value:
            for key, value in user.value if isinstance(user, yaml.MappingNode) else ():
                if key.value in ("ssh_authorized_keys", "ssh-authorized-keys"):
                    if not isinstance(value, yaml.SequenceNode):
                        self._wrong(value, first, "ssh_authorized_keys of a user", "list")
                    self._items(value, first, "ssh_authorized_keys", ("text",))

    def _wrong(self, node: yaml.Node, first: int, what: str, shape: str, hint: str = "") -> NoReturn:
        line, column = first + node.start_mark.line, node.start_mark.column
        self.fail(line, column, f"{what} must be {_with_article(shape)}, this is {_article(node)}", hint)

    # --- meta-data and network-config ---

    def meta(self, node: yaml.Node | None) -> None:
        if not isinstance(node, yaml.MappingNode):
            self.fail(0, 0, "meta-data must be a mapping")
        if not _member(node, "instance-id"):
            self.warn(0, "no instance-id: cloud-init cannot tell a first boot from a later one")

    def network(self, node: yaml.Node | None) -> None:
        """Version 1 (a list of typed entries) or 2 (netplan's sections), with or without `network:` above."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(0, 0, "network-config must be a mapping with 'version: 1' or 'version: 2'")
        inner = next((value for key, value in node.value if key.value == "network"), node)
        if not isinstance(inner, yaml.MappingNode):
            self._wrong(inner, 0, "network", "mapping")
        if _member(inner, "config") == "disabled":
            return
        version = _member(inner, "version")
        if version not in ("1", "2"):
            found = "there is no 'version'" if version is None else f"version {version!r} is not known"
            self.fail(inner.start_mark.line, inner.start_mark.column, found, "write 'version: 2'")
        for key, value in inner.value:
            if version == "1" and key.value == "config":
                self._items(value, 0, "config", ("mapping",))
                if not isinstance(value, yaml.SequenceNode):
                    self._wrong(value, 0, "config", "list")
                for item in value.value:
                    if (kind := _member(item, "type")) not in _NETWORK_V1_TYPES:
                        problem = f"type {kind!r} is not one of {', '.join(_NETWORK_V1_TYPES)}"
                        self.fail(item.start_mark.line, item.start_mark.column, problem)
            elif version == "2" and key.value in _NETWORK_V2_SECTIONS:
                if not isinstance(value, yaml.MappingNode):
                    self._wrong(value, 0, key.value, "mapping")
                for name, device in value.value:
                    if not isinstance(device, yaml.MappingNode):
                        self._wrong(device, 0, f"{key.value} {name.value}", "mapping")
            elif key.value not in ("version", "config", "renderer", "network") or (version, key.value) == (
                "2",
                "config",
            ):
                self.warn(key.start_mark.line, f"unknown key {str(key.value)[:60]!r} in version {version}")


def _tabbed(row: str) -> bool:
    return "\t" in row[: len(row) - len(row.lstrip())]


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping once, even if aliases refer to it many times."""
    pending: list[yaml.Node] = [node] if node is not None else []
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            pending.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def _member(node: yaml.Node, name: str) -> str | None:
    """The text of a mapping's key; "" if its value is not a scalar, None if it is not there."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == name:
            return str(value.value) if isinstance(value, yaml.ScalarNode) else ""
    return None


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "mapping"
    if isinstance(node, yaml.SequenceNode):
        return "list"
    kind = node.tag.rpartition(":")[2]
    return {"null": "empty", "bool": "true or false", "int": "number", "float": "number"}.get(kind, "text")


def _fits(node: yaml.Node, shape: str) -> bool:
    found = _shape(node)
    if shape == "text":  # YAML's dates and numbers are text to cloud-init where it wants text
        return found in ("text", "number")
    return shape == "anything" or found == shape


def _with_article(shape: str) -> str:
    return shape if shape.startswith(("text", "true")) else f"a {shape}"


def _article(node: yaml.Node) -> str:
    return _with_article(_shape(node))
