#!/bin/sh
# Prepares the guest of the tests in tests/vm/ and of the demo: QEMU, a Debian kernel and an
# initramfs.
#
# Installs QEMU if it is missing (on Debian and its derivatives; as root or through sudo). Fetches
# the kernel, busybox and tools that busybox lacks from the same archive and unpacks them, without
# installing them, below target/guest/ or $CARGO_TARGET_DIR/guest/:
#   vmlinuz              a stock Debian kernel
#   initramfs.cpio.gz    busybox, the tools, the virtio drivers and tests/guest/init
#   fio.raw              a read-only disk with fio, for the tests that need it
# Does and prints nothing if everything is there. Remove that directory to build everything again.

set -eu

sources=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$(dirname "$sources")")
guest=${CARGO_TARGET_DIR:-$project/target}/guest
what=guest

. "$project/tests/packages.sh"

install_qemu() {
    command -v apt-get >/dev/null ||
        fail "install qemu-system-x86_64 and qemu-img first: this script knows apt-get only"
    may_be_root ||
        fail "not root and no sudo; install these packages first: qemu-system-x86 qemu-utils"
    refresh_package_lists
    version=$(apt-cache show qemu-system-x86 | awk '/^Version:/ { print $2; exit }')
    [ -n "$version" ] || fail "the package archive has no qemu-system-x86"
    say "installing qemu-system-x86 and qemu-utils $version"
    # Both come from one source and must have one version; qemu-utils may be installed in another.
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --allow-downgrades \
        --no-install-recommends qemu-system-x86 "qemu-utils=$version"
}

# Prints the name of the kernel package that the meta package depends on.
kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        awk '/Depends: linux-image-/ { print $2; exit }'
}

fetch_kernel_and_busybox() {
    command -v apt-get >/dev/null ||
        fail "apt-get is needed to fetch a Debian kernel and busybox-static"
    refresh_package_lists
    kernel=$(kernel_package)
    [ -n "$kernel" ] ||
        fail "the package archive has no linux-image-cloud-amd64; try apt-get update"
    say "fetching $kernel and busybox-static"
    fetch "$kernel" "$scratch/system"
    fetch busybox-static "$scratch/system"
    rm -rf "$guest/system"
    mv "$scratch/system" "$guest/system"
    ln -f "$guest/system/boot/vmlinuz-"* "$guest/vmlinuz"
}

# Tools that busybox lacks, or has without what the tests need: write zeroes, punch holes, ext4 with
# a journal.
tools='blkdiscard fallocate mke2fs e2fsck'

# Fetches the tools, with the libraries they need, into a directory of their own.
fetch_tools() {
    refresh_package_lists
    # The libraries of e2fsprogs suffice for util-linux. Their names differ between releases.
    libraries=$(apt-cache depends e2fsprogs 2>/dev/null |
        awk '/Depends: lib/ { print $2 }' | sort -u)
    [ -n "$libraries" ] || fail "the package archive has no e2fsprogs; try apt-get update"
    say "fetching util-linux and e2fsprogs with" $libraries
    for package in util-linux e2fsprogs $libraries; do
        fetch "$package" "$scratch/tools"
    done
    rm -rf "$guest/tools" "$guest/initramfs.cpio.gz"
    mv "$scratch/tools" "$guest/tools"
}

# find_libraries FROM: sets $loader to the loader that is below FROM, and $directories to where the
# libraries are.
find_libraries() {
    loader=$(find "$1" -name 'ld-linux-x86-64.so.*' -type f | head -n 1)
    directories=$(find "$1" -name 'lib*.so.*' -exec dirname '{}' ';' |
        sort -u | tr '\n' ':')
}

# copy_programs FROM PROGRAMS LIBRARIES NAME...: copies programs that are below FROM to the
# directory PROGRAMS, and the libraries that they need to LIBRARIES. Sets $loader.
copy_programs() {
    from=$1
    programs=$2
    libraries=$3
    shift 3
    mkdir -p "$programs" "$libraries"
    find_libraries "$from"
    for program in "$@"; do
        file=$(find "$from" -path "*bin/$program" -type f | head -n 1)
        [ -n "$file" ] || fail "no package has $program"
        cp "$file" "$programs/"
        "$loader" --library-path "$directories" --list "$file"
    done >"$scratch/libraries"
    ! grep 'not found' "$scratch/libraries" >&2 || fail "libraries are missing"
    awk '$2 == "=>" && $1 !~ "/" { print $3 }' "$scratch/libraries" | sort -u |
        while IFS= read -r library; do
            cp -L "$library" "$libraries/"
        done
}

# install_tools ROOT: copies the tools there, and the loader and the libraries to where the loader
# searches for them.
install_tools() {
    copy_programs "$guest/tools" "$1/sbin" "$1/lib" $tools
    mkdir -p "$1/lib64"
    cp "$loader" "$1/lib64/"
}

# Fetches fio, the libraries with which it is linked, and what those depend on.
fetch_fio() {
    refresh_package_lists
    libraries=$(apt-cache depends fio 2>/dev/null | awk '/Depends: z?lib/ { print $2 }')
    [ -n "$libraries" ] || fail "the package archive has no fio; try apt-get update"
    libraries=$(apt-cache depends --recurse --important $libraries 2>/dev/null |
        grep -E '^z?lib' | sort -u)
    say "fetching fio with the libraries of its engines"
    fetch_all "$scratch/fio" fio $libraries
    rm -rf "$scratch/fio/usr/share" "$guest/fio" "$guest/fio.raw"
    mv "$scratch/fio" "$guest/fio"
}

# fio is linked with the libraries of all storage systems that it knows: more than 80 MB, which
# would take every guest too long to unpack. It has a disk of its own, of which a guest reads what
# it needs.
build_fio_disk() {
    say "building the disk with fio"
    root=$scratch/disk
    copy_programs "$guest/fio" "$root/lib" "$root/lib" fio
    cp "$loader" "$root/lib/loader"
    cat >"$root/fio" <<'END'
#!/bin/sh
directory=${0%/*}/lib
exec "$directory/loader" --library-path "$directory" "$directory/fio" "$@"
END
    chmod 755 "$root/fio"
    find_libraries "$guest/tools"
    mke2fs=$(find "$guest/tools" -path '*bin/mke2fs' -type f | head -n 1)
    quietly env MKE2FS_CONFIG="$guest/tools/etc/mke2fs.conf" \
        "$loader" --library-path "$directories" "$mke2fs" \
        -q -t ext4 -b 4096 -m 0 -O ^has_journal -d "$root" "$scratch/fio.raw" 160M
    mv "$scratch/fio.raw" "$guest/fio.raw"
}

# The drivers that the guest needs, each after its dependencies. Kernels differ in which of them are
# modules, built in, or no longer there.
modules='virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    crc16 crc32c_generic mbcache jbd2 ext4'

build_initramfs() {
    say "building the initramfs"
    root=$scratch/root
    mkdir -p "$root/bin" "$root/modules"
    cp "$sources/init" "$root/init"
    chmod 755 "$root/init"
    busybox=$(find "$guest/system" -name busybox -type f -perm -100 | head -n 1)
    cp "$busybox" "$root/bin/busybox"
    ln -s busybox "$root/bin/sh"
    install_tools "$root"

    number=10
    for module in $modules; do
        file=$(find "$guest/system" -name "$module.ko*" -type f | head -n 1)
        target=$root/modules/$number-$module.ko
        case $file in
        *.ko) cp "$file" "$target" ;;
        *.ko.xz) "$busybox" xzcat "$file" >"$target" ;;
        *.ko.gz) "$busybox" zcat "$file" >"$target" ;;
        *.ko.*) fail "do not know how to unpack $file" ;;
        esac
        number=$((number + 1))
    done

    (cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$scratch/initramfs"
    mv "$scratch/initramfs" "$guest/initramfs.cpio.gz"
}

make_scratch "$guest"

if ! command -v qemu-system-x86_64 >/dev/null || ! command -v qemu-img >/dev/null; then
    install_qemu
fi
if ! [ -s "$guest/vmlinuz" ] || ! [ -d "$guest/system" ]; then
    fetch_kernel_and_busybox
fi
if ! [ -d "$guest/tools" ]; then
    fetch_tools
fi
if ! is_fresh "$guest/initramfs.cpio.gz" \
    "$sources/init" "$sources/prepare.sh" "$guest/vmlinuz"; then
    build_initramfs
fi
if ! [ -d "$guest/fio" ]; then
    fetch_fio
fi
if ! is_fresh "$guest/fio.raw" "$sources/prepare.sh" "$guest/fio"; then
    build_fio_disk
fi
