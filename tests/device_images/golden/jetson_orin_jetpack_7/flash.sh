#!/bin/sh
# Write board-1: make NVIDIA's root file system that of this board, and have NVIDIA's tools write it over USB.
# Run again, it does the same.  What an earlier board of the same folder left in the root file system goes.
set -eu
usage="usage: sudo ./flash.sh [--accept-license] LINUX_FOR_TEGRA [MEDIUM [CONFIGURATION]]
  --accept-license  you have read NVIDIA's licence and accept it; without it, NVIDIA's tool shows it and asks
  LINUX_FOR_TEGRA   NVIDIA's folder of release R39, with the sample root file system in rootfs/
  MEDIUM            where the system goes: nvme, sd_card, usb (without it, nvme)
  CONFIGURATION     another one of NVIDIA's flash configurations, for another carrier board: a NAME.conf of that folder"
user=ada
host=board-1

refuse() {
    printf '%s\n' "$*" >&2
    exit 1
}

license=
if [ "${1:-}" = --accept-license ]; then
    license=$1
    shift
fi
case ${1:-} in
'' | -*)
    printf '%s\n' "$usage" >&2
    exit 2
    ;;
esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
tegra=$(CDPATH='' cd -- "$1" 2>/dev/null && pwd) || refuse "$1 is no folder; name NVIDIA's Linux_for_Tegra"
root=$tegra/rootfs
medium=${2:-nvme}
case $medium in
nvme)
    configuration=${3:-jetson-orin-nano-devkit}
    set -- ./l4t_initrd_flash.sh "$configuration" internal
    ;;
sd_card)
    configuration=${3:-jetson-orin-nano-devkit}
    set -- ./l4t_initrd_flash.sh --external-device mmcblk0p1 "$configuration" internal
    ;;
usb)
    configuration=${3:-jetson-orin-nano-devkit}
    set -- ./l4t_initrd_flash.sh --external-device sda1 "$configuration" internal
    ;;
*) refuse "this board is written to nvme or sd_card or usb, not to $medium" ;;
esac

# ── is everything there? ─────────────────────────────────────────────────────────────────────────────────────────────
if [ ! -f "$tegra/flash.sh" ] || [ ! -f "$tegra/tools/l4t_create_default_user.sh" ]; then
    refuse "$tegra is not NVIDIA's Linux_for_Tegra: it has no flash.sh and tools/l4t_create_default_user.sh; unpack the" \
        "Driver Package (BSP) of R39, and name the folder Linux_for_Tegra in it"
fi
if [ ! -f "$root/etc/nv_tegra_release" ] || [ ! -f "$root/etc/ssh/sshd_config" ]; then
    refuse "$root is not ready: unpack the Sample Root Filesystem of R39 into it, and run sudo ./apply_binaries.sh in" \
        "$tegra"
fi
release=$(sed -n 's/^# \(R[0-9][0-9]*\) .*/\1/p' "$root/etc/nv_tegra_release")
if [ "$release" != R39 ]; then
    refuse "$root is of release ${release:-unknown}, and this board's files are for R39: name a Linux_for_Tegra of" \
        "R39, or render the files for another image"
fi
if [ ! -f "$tegra/$configuration.conf" ]; then
    refuse "$tegra has no $configuration.conf: it is another release's, or another board's Driver Package; look which .conf" \
        "files it has, and name one as the third word"
fi
if [ "$(id -u)" != 0 ]; then
    refuse "only root may write the root file system: sudo ./flash.sh …"
fi
earlier=$(sed -n 's/ .*//p' "$root/etc/sudoers.d/90-edge-testbed" 2>/dev/null || true)
if [ -n "$earlier" ] && [ "$earlier" != "$user" ]; then
    refuse "$root was made for a board whose user is $earlier, and here it is $user: unpack a new Linux_for_Tegra"
fi
if ! command -v lsusb >/dev/null; then
    refuse "lsusb is not installed, which shows whether a board is in recovery mode: sudo apt install usbutils"
fi
# 0955:7020 is a Jetson that runs Linux.
if ! lsusb | grep -i 'ID 0955:' | grep -qv ':7020'; then
    refuse "no Jetson in recovery mode is on USB: lsusb should show a line with ID 0955: (NVIDIA), README.txt tells how"
fi

# ── the root file system ─────────────────────────────────────────────────────────────────────────────────────────────
list=$root/etc/edge-testbed/rootfs_overlay.list
if [ -f "$list" ]; then
    while IFS= read -r path; do rm -f -- "$root/$path"; done <"$list"
fi
mkdir -p -- "$root/etc/edge-testbed"
: >"$list.new"
(cd -- "$here/rootfs_overlay" && find . -type f) | while IFS= read -r path; do
    mode=$(stat -c %a -- "$here/rootfs_overlay/$path")
    install -D -m "$mode" -- "$here/rootfs_overlay/$path" "$root/$path"
    printf '%s\n' "$path" >>"$list.new"
done
mv -- "$list.new" "$list"

printf '%s\n' "$host" >"$root/etc/hostname"
if ! grep -q "^$user:" "$root/etc/passwd"; then
    # Without -p the tool takes a password at random, and shows it: it is locked below.
    (cd -- "$tegra" && ./tools/l4t_create_default_user.sh -u "$user" -n "$host" ${license:+"$license"})
fi
sed -i '/^127\.0\.1\.1[[:space:]]/d' "$root/etc/hosts"
printf '127.0.1.1 %s\n' "$host" >>"$root/etc/hosts"

# Keys open the account, no password does.
sed -i "s/^$user:[^:]*:/$user:*:/" "$root/etc/shadow"
owner=$(sed -n "s/^$user:[^:]*:\([0-9]*:[0-9]*\):.*/\1/p" "$root/etc/passwd")
home=$root$(sed -n "s/^$user:[^:]*:[^:]*:[^:]*:[^:]*:\([^:]*\):.*/\1/p" "$root/etc/passwd")
install -d -m 700 -- "$home/.ssh"
install -m 600 -- "$here/rootfs_overlay/etc/edge-testbed/authorized_keys" "$home/.ssh/authorized_keys"
chown -R "$owner" "$home/.ssh"
rm -f -- "$root/etc/sudoers.d/90-edge-testbed"
printf '%s ALL=(ALL) NOPASSWD:ALL\n' "$user" >"$root/etc/sudoers.d/90-edge-testbed"
chmod 440 "$root/etc/sudoers.d/90-edge-testbed"

# OpenSSH before 8.2 (JetPack 4) reads no sshd_config.d: there the lines stand first in its one file, where they count.
sshd=$root/etc/ssh/sshd_config
sed -i '/^# edge-testbed: from here$/,/^# edge-testbed: to here$/d' "$sshd"
if ! grep -qi '^[[:space:]]*Include[[:space:]].*/sshd_config\.d/' "$sshd"; then
    {
        echo "# edge-testbed: from here"
        cat "$root/etc/ssh/sshd_config.d/10-edge-testbed.conf"
        echo "# edge-testbed: to here"
        cat "$sshd"
    } >"$sshd.new"
    cat "$sshd.new" >"$sshd"
    rm -f -- "$sshd.new"
fi

wants=$root/etc/systemd/system/multi-user.target.wants
mkdir -p -- "$wants"
ln -sf ../edge-testbed-first-boot.service "$wants/edge-testbed-first-boot.service"
rm -rf -- "$root/var/lib/edge-testbed"

# ── the board ────────────────────────────────────────────────────────────────────────────────────────────────────────
echo "$host: $root is ready; in $tegra: $*"
cd -- "$tegra"
"$@"
echo "done: $host is written ($configuration, $medium); unplug the USB cable, take the recovery jumper off, and start it"
