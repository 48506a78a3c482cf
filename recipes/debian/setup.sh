#!/bin/sh
# Runs inside the finished root, as its root.
set -eu

systemctl enable systemd-networkd.service systemd-resolved.service
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
echo localhost >/etc/hostname
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >/etc/hosts
echo LANG=C.UTF-8 >/etc/default/locale
passwd -l root >/dev/null

# Nothing that must differ between guests, or that came from the host.
rm -f /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed /etc/.pwd.lock
: >/etc/machine-id
