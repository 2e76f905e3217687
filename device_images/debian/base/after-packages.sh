#!/bin/sh
# Runs when every package is installed: $1 is the root of the image.  What tells one board from another goes; cloud-init
# gives it at the first boot.
set -eu
echo "/dev/vda / ext4 noatime,errors=remount-ro 0 1" >"$1/etc/fstab"
echo "datasource_list: [NoCloud, None]" >"$1/etc/cloud/cloud.cfg.d/90-edge-testbed.cfg"
rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/hostname"
: >"$1/etc/machine-id"
chroot "$1" systemctl enable systemd-networkd.service
# Nothing begins by itself while a run is measured.
chroot "$1" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
