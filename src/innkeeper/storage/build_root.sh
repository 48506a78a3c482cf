# The last hook of mmdebstrap: turns the root ($1) into an ext4 file system in the disk file, and hands out what the
# boot loader needs. Runs as the root's root, whatever that is outside; reaches our files only through descriptors.
#   DISK_FD  the disk file        FILES_FD  gets a tar of boot loader files
#   OFFSET   of the file system in the disk, bytes     FREE  room to leave in it, bytes     UUID  of it
set -eu
root=$1

if [ -e "$root/innkeeper-setup" ]; then
    chroot "$root" /bin/sh /innkeeper-setup
    rm "$root/innkeeper-setup"
fi
chroot "$root" dpkg-query -W -f 'package ${Package} ${Version}\n'

# GRUB: the disk has a BIOS core image with its modules built in, made here because the program is the guest's.
mkdir -p "$root/boot/grub" "$root/boot/efi" "$root/innkeeper-grub"
cp "$root/innkeeper-early.cfg" "$root/innkeeper-grub/early.cfg"
chroot "$root" grub-mkimage -O i386-pc -p /boot/grub -c /innkeeper-early.cfg -o /innkeeper-grub/core.img \
    biosdisk part_gpt part_msdos ext2 search search_fs_uuid normal configfile linux gzio zstd echo serial terminal \
    test true minicmd sleep reboot halt cat ls all_video gfxterm loadenv
cp "$root/usr/lib/grub/i386-pc/boot.img" "$root/usr/lib/shim/shimx64.efi.signed" \
    "$root/usr/lib/shim/mmx64.efi.signed" "$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" \
    "$root/innkeeper-grub"
mkdir -p "$root/boot/grub/i386-pc"
cp "$root"/usr/lib/grub/i386-pc/*.mod "$root"/usr/lib/grub/i386-pc/*.lst "$root/boot/grub/i386-pc"
tar -C "$root/innkeeper-grub" -cf - . >"/proc/self/fd/$FILES_FD"
rm -r "$root/innkeeper-grub" "$root/innkeeper-early.cfg"

# What mmdebstrap itself would clean after this hook.
if [ -e "$root/sbin/start-stop-daemon.REAL" ]; then
    mv "$root/sbin/start-stop-daemon.REAL" "$root/sbin/start-stop-daemon"
fi
rm -rf "$root/usr/sbin/policy-rc.d" "$root"/etc/apt/apt.conf.d/*mmdebstrap "$root"/var/lib/apt/lists/* \
    "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root/var/cache/ldconfig/aux-cache" \
    "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old
find "$root/var/log" -type f -delete

# The root without what is mounted in it: a bind mount shows that. Where mounting is not allowed nothing is mounted.
tree=$root
mkdir "$root.tree"
if mount --bind "$root" "$root.tree" 2>/dev/null; then
    tree=$root.tree
    trap 'umount "$tree"' EXIT
fi
if [ -e "$tree/proc/self" ]; then
    echo "$root/proc is mounted, and no bind mount can be made to look behind it" >&2
    exit 1
fi
for folder in run tmp dev; do
    find "$tree/$folder" -xdev -mindepth 1 -delete 2>/dev/null || true
done

used=$(du -sxk "$tree" | cut -f 1)
blocks=$(((used * 1024 * 21 / 20 + FREE) / 4096 + 16384))
blocks=$(((blocks + 255) / 256 * 256))
# GRUB 2.06 reads neither metadata_csum_seed nor orphan_file. lazy_*_init: the file is zeros already.
mke2fs -q -F -t ext4 -b 4096 -m 1 -L root -U "$UUID" -d "$tree" \
    -O ^metadata_csum_seed,^orphan_file -E "offset=$OFFSET,lazy_itable_init=1,lazy_journal_init=1,nodiscard" \
    "/proc/self/fd/$DISK_FD" "$blocks"
echo "blocks $blocks"
