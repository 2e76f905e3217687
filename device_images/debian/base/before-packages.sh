#!/bin/sh
# Runs before any package but the essential ones is unpacked: $1 is the root of the image.
# The initial RAM disk is for QEMU's "virt" and "q35" machines only: with every driver, making it takes minutes where
# each program is emulated.
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/initramfs-tools/hooks"
echo "MODULES=list" >"$1/etc/initramfs-tools/conf.d/edge-testbed"
cat >"$1/etc/initramfs-tools/hooks/edge-testbed" <<'HOOK'
#!/bin/sh
case "${1:-}" in prereqs) exit 0 ;; esac
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_pci virtio_blk ext4
HOOK
chmod 755 "$1/etc/initramfs-tools/hooks/edge-testbed"
