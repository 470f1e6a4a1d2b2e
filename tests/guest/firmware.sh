#!/bin/sh
# Makes the disks from which the tests boot the guest of tests/guest/prepare.sh, as an installed
# system boots: the firmware reads a boot loader from the disk, and that the kernel and the
# initramfs.
#
# Below target/guest/ or $CARGO_TARGET_DIR/guest/:
#   bios.raw    a partition table of the MBR kind, and SYSLINUX, for SeaBIOS
#   uefi.raw    a GPT with an EFI system partition, and systemd-boot, for OVMF
#   OVMF.fd     that firmware
# Both partition tables count in sectors of 512 bytes. Installs fdisk, mtools and syslinux if they
# are missing (on Debian and its derivatives; as root or through sudo), and fetches the rest. Does
# and prints nothing if everything is there.

set -eu

sources=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$(dirname "$sources")")
guest=${CARGO_TARGET_DIR:-$project/target}/guest
what=firmware

. "$project/tests/packages.sh"

# The only partition, in sectors. FAT needs a multiple of the 63 sectors in a track.
start=2048
sectors=$((63 * 2000))

# A package of Debian keeps sfdisk where only root searches.
PATH=$PATH:/usr/sbin:/sbin

install_tools() {
    missing=
    for tool in fdisk:sfdisk mtools:mcopy syslinux:syslinux; do
        command -v "${tool#*:}" >/dev/null || missing="$missing ${tool%:*}"
    done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $missing
}

fetch_boot_loaders() {
    command -v apt-get >/dev/null ||
        fail "apt-get is needed to fetch Debian's packages ovmf and systemd-boot-efi"
    refresh_package_lists
    say "fetching ovmf and systemd-boot-efi"
    for package in ovmf systemd-boot-efi; do
        fetch "$package" "$scratch/boot"
    done
    rm -rf "$guest/boot"
    mv "$scratch/boot" "$guest/boot"
    ln -f "$guest/boot/usr/share/ovmf/OVMF.fd" "$guest/OVMF.fd"
}

# make_disk IMAGE LABEL TYPE [FLAG]: an image with one partition, which holds the guest.
make_disk() {
    truncate -s $(((start + sectors + 2048) * 512)) "$1"
    printf 'label: %s\nunit: sectors\n\nstart=%d, size=%d, type=%s%s\n' \
        "$2" "$start" "$sectors" "$3" "${4:-}" >"$scratch/table"
    quietly sfdisk --quiet "$1" <"$scratch/table"
    partition=$1@@$((start * 512))
    quietly mformat -i "$partition" -T "$sectors" -h 16 -s 63 -H "$start" ::
    quietly mcopy -i "$partition" "$guest/vmlinuz" ::vmlinuz
    quietly mcopy -i "$partition" "$guest/initramfs.cpio.gz" ::initramfs
}

# Without a test of the timer: tests that boot the kernel directly say why.
arguments='console=ttyS0 panic=-1 no_timer_check'

make_bios_disk() {
    image=$scratch/bios.raw
    make_disk "$image" dos c ', bootable'
    printf '%s\n' 'SERIAL 0 115200' 'DEFAULT guest' 'LABEL guest' ' LINUX /vmlinuz' \
        ' INITRD /initramfs' " APPEND $arguments" >"$scratch/syslinux.cfg"
    quietly mcopy -i "$partition" "$scratch/syslinux.cfg" ::syslinux.cfg
    quietly syslinux --offset $((start * 512)) --install "$image"
    quietly as --32 -o "$scratch/mbr.o" "$sources/mbr.s"
    quietly ld -m elf_i386 --oformat binary -Ttext 0x600 -e start -o "$scratch/mbr" "$scratch/mbr.o"
    quietly dd if="$scratch/mbr" of="$image" conv=notrunc
    mv "$image" "$guest/bios.raw"
}

make_uefi_disk() {
    image=$scratch/uefi.raw
    make_disk "$image" gpt uefi
    quietly mmd -i "$partition" ::EFI ::EFI/BOOT ::loader ::loader/entries
    quietly mcopy -i "$partition" "$guest/boot/usr/lib/systemd/boot/efi/systemd-bootx64.efi" \
        ::EFI/BOOT/BOOTX64.EFI
    printf '%s\n' 'title guest' 'linux /vmlinuz' 'initrd /initramfs' "options $arguments" \
        >"$scratch/guest.conf"
    quietly mcopy -i "$partition" "$scratch/guest.conf" ::loader/entries/guest.conf
    mv "$image" "$guest/uefi.raw"
}

make_scratch "$guest"

install_tools
if ! [ -d "$guest/boot" ]; then
    fetch_boot_loaders
fi
for disk in bios uefi; do
    if ! is_fresh "$guest/$disk.raw" \
        "$sources/firmware.sh" "$sources/mbr.s" "$guest/vmlinuz" "$guest/initramfs.cpio.gz"; then
        say "making the disk for $disk"
        "make_${disk}_disk"
    fi
done
