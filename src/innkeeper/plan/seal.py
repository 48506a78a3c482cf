"""What must not be in an image that many machines start from, as shell scripts for a guest of ours that has the disks
of another attached. It is thrown away, so a file system that was made to break whoever mounts it breaks nothing.

One line for each finding: kind, tab, path. Nothing of a file's content leaves the guest.
"""

from __future__ import annotations

from collections.abc import Sequence

KINDS = {
    "host-key": "SSH host key: all machines could pose as each other",
    "machine-id": "machine-id: all machines would have the same",
    "cloud-init": "what cloud-init left: user-data may hold secrets",
    "history": "history of commands",
    "password": "password hash",
    "private-key": "private key",
    "token": "token or password of another service",
    "unread": "no file system that can be read, so nobody knows what is in it",
}
"""Kind of a finding → what it is."""
CLEANED = ("host-key", "machine-id", "cloud-init", "history")
"""Kinds that `clean` removes: what every machine makes anew, or nobody misses."""
MOST = 1000
"""Findings that are listed."""

# Relative to a home folder.
_TOKENS = (
    ".aws/credentials", ".azure/accessTokens.json", ".config/gcloud/credentials.db", ".config/gh/hosts.yml",
    ".config/innkeeper/id_ed25519", ".config/rclone/rclone.conf", ".docker/config.json", ".git-credentials",
    ".kube/config", ".my.cnf", ".netrc", ".npmrc", ".pgpass", ".pypirc", ".vault-token",
)  # fmt: skip
_SYSTEM_TOKENS = ("etc/innkeeper/*", "etc/kubernetes/admin.conf", "etc/rancher/k3s/k3s.yaml", "var/lib/innkeeper/*")
_HISTORIES = (".*_history", ".viminfo", ".lesshst", ".local/share/fish/fish_history")
_CLOUD_INIT = ("var/lib/cloud/instances/*", "var/log/cloud-init.log", "var/log/cloud-init-output.log")
_KEY_FOLDERS = ("etc", "root", "home", "srv", "opt", "usr/local", "var/lib", "var/www")
_PASSED_OVER = ("dpkg", "apt", "docker", "containers", "cloud", "systemd")
"""Of var/lib: large, and looked at otherwise or not at all."""

# Each disk and partition is tried; $root is where it is mounted. `noload` and `norecovery` leave a journal alone.
_MOUNT = r"""
root=/run/sealed
mkdir -p $root
attach() {
  for how in $HOW; do
    mount -t "${how%%:*}" -o "${how#*:}" "$1" $root 2>/dev/null && return
  done
  return 1
}
for disk in /sys/class/block/vd[a-z]; do
  disk=/dev/${disk##*/}
  found=
  for part in "$disk" "$disk"[0-9]*; do
    [ -b "$part" ] && attach "$part" || continue
    found=1
    seal
    umount $root
  done
  [ -n "$found" ] || [ -z "$(head -c 1048576 "$disk" | tr -d '\0' | head -c 1)" ] || unread "$disk"
done
"""

_LOOK = r"""
say() {
  kind=$1
  shift
  for file; do
    [ -f "$file" ] && [ -s "$file" ] && [ ! -L "$file" ] || [ -d "$file" ] && printf '%s\t%s\n' $kind "${file#$root}"
  done
}
unread() { printf 'unread\t%s\n' "$1"; }
seal() {
  cd $root
  say host-key $root/etc/ssh/ssh_host_*_key
  id=
  [ -L $root/etc/machine-id ] || { read -r id <$root/etc/machine-id; } 2>/dev/null
  case "$id" in ''|uninitialized) ;; *) say machine-id $root/etc/machine-id ;; esac
  say cloud-init @CLOUD_INIT@
  say history @HISTORIES@
  [ -L $root/etc/shadow ] || awk -F: '{ sub(/^!+/, "", $2) } length($2) > 12 {
    printf "password\t/etc/shadow: %s\n", $1 }' $root/etc/shadow 2>/dev/null
  say token @TOKENS@
  for folder in @KEY_FOLDERS@; do
    [ -d $root/$folder ] && [ ! -L $root/$folder ] && find $root/$folder -xdev @PASSED_OVER@ -type f -size -65k \
      ! -name 'ssh_host_*_key' -exec grep -lE -e '^-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----' {} + 2>/dev/null
  done | while IFS= read -r file; do say private-key "$file"; done
  cd /
}
"""

_CLEAN = r"""
unread() { :; }
seal() {
  rm -f $root/etc/ssh/ssh_host_*
  [ ! -f $root/etc/machine-id ] || [ -L $root/etc/machine-id ] || : >$root/etc/machine-id
  [ -L $root/var/lib/dbus/machine-id ] || rm -f $root/var/lib/dbus/machine-id
  rm -rf $root/var/lib/cloud/instance $root/var/lib/cloud/instances/* $root/var/lib/cloud/data/* \
    $root/var/lib/cloud/sem/* $root/var/log/cloud-init*.log $root/var/lib/systemd/random-seed
  rm -f @HISTORIES@
}
"""


def scan_script() -> str:
    """For `sh`: prints the findings; the disks are attached read-only."""
    hows = "ext4:ro,noload xfs:ro,norecovery,nouuid btrfs:ro vfat:ro squashfs:ro"
    return f"HOW='{hows}'\n{_filled(_LOOK)}{_MOUNT}exit 0\n"


def clean_script() -> str:
    """For `sh`: removes what is of the `CLEANED` kinds; the disks are attached for writing."""
    return f"HOW='ext4:rw xfs:rw,nouuid btrfs:rw'\n{_filled(_CLEAN)}{_MOUNT}sync\nexit 0\n"


def _filled(script: str) -> str:
    passed_over = " ".join(f"-path $root/var/lib/{name} -prune -o" for name in _PASSED_OVER)
    for name, value in {
        "CLOUD_INIT": _under(_CLOUD_INIT),
        "HISTORIES": _in_homes(_HISTORIES),
        "TOKENS": f"{_in_homes(_TOKENS)} {_under(_SYSTEM_TOKENS)}",
        "KEY_FOLDERS": " ".join(_KEY_FOLDERS),
        "PASSED_OVER": passed_over,
    }.items():
        script = script.replace(f"@{name}@", value)
    return script


def _under(paths: Sequence[str]) -> str:
    return " ".join(f"$root/{path}" for path in paths)


def _in_homes(paths: Sequence[str]) -> str:
    """Also where a disk has nothing but what is mounted at /home."""
    return " ".join(_under([f"root/{path}", f"home/*/{path}", f"[a-z]*/{path}"]) for path in paths)


def findings(text: str) -> list[dict[str, str]]:
    """What a scan printed, as [{kind, path}], each once. File names are a stranger's: what cannot be shown is
    replaced."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in text.splitlines():
        kind, tab, path = line.partition("\t")
        if tab and kind in KINDS:
            shown = "".join(char if char.isprintable() else "?" for char in path)[:500]
            found.setdefault((kind, shown), {"kind": kind, "path": shown})
    return list(found.values())[:MOST]
