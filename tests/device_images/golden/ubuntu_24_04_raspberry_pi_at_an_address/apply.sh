#!/bin/sh
# Copy the files of this folder onto the boot partition of a card that is mounted here: ./apply.sh /media/…/bootfs
# Run again, it changes nothing.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${1:?"usage: ./apply.sh BOOT-PARTITION (where the card's FAT partition is mounted)"}
line=$target/cmdline.txt
if [ ! -f "$line" ] || [ ! -f "$target/config.txt" ]; then
    echo "$target is no boot partition of a Raspberry Pi: it has no cmdline.txt and config.txt; name the folder where" \
        "the card's FAT partition is mounted" >&2
    exit 1
fi
for name in user-data meta-data network-config cmdline.append; do
    if [ ! -f "$here/bootfs/$name" ]; then
        echo "$here/bootfs has no $name: render the files anew" >&2
        exit 1
    fi
done
# The kernel reads one line, whatever else stands in the file.
read -r words <"$line" || true
if [ -z "$words" ]; then
    echo "$line has no words in its first line, and a board does not boot without them: write the publisher's image to" \
        "the card anew; nothing was changed" >&2
    exit 1
fi
read -r added <"$here/bootfs/cmdline.append" || true
for name in user-data meta-data network-config; do
    cp -- "$here/bootfs/$name" "$target/$name"
done
for word in $added; do
    case " $words " in *" $word "*) ;; *) words="$words $word" ;; esac
done
printf '%s\n' "$words" >"$line.new"
mv -- "$line.new" "$line"
sync
echo "done: $target has the files of this board; unmount it, and boot the board with the card"
