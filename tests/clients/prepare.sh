#!/bin/sh
# Prepares the programs with which the tests use the operator's interfaces.
#
# Under target/clients/ or $CARGO_TARGET_DIR/clients/:
#   venv/        the QEMU project's monitor client, qemu.qmp, with qmp-shell
#   promtool     Prometheus' checker of metrics
# Installs python3-venv, systemd's tools, shells, man page readers, btrfs-progs, xfsprogs and
# e2fsprogs if they are missing (on Debian and its derivatives; as root or through sudo). Does and
# prints nothing if everything is there. Remove that directory to build everything again.

set -eu

sources=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$(dirname "$sources")")
clients=${CARGO_TARGET_DIR:-$project/target}/clients
what=clients

. "$project/tests/packages.sh"

# A virtual environment built with these versions is kept.
wanted=$(cksum <"$sources/requirements.txt")

# Installs the programs with which the tests try the installed files, and make and check file
# systems.
install_tools() {
    missing=
    for tool in systemd:systemd-analyze systemd:systemd-socket-activate systemd:systemd-sysusers \
        man-db:man mandoc:mandoc zsh:zsh fish:fish \
        btrfs-progs:mkfs.btrfs xfsprogs:mkfs.xfs e2fsprogs:mkfs.ext4; do
        command -v "${tool#*:}" >/dev/null || missing="$missing ${tool%:*}"
    done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_packages $(printf '%s\n' $missing | sort -u)
}

make_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv
    say "making a Python environment with $(grep -v '^#' "$sources/requirements.txt")"
    rm -rf "$clients/venv"
    quietly python3 -m venv "$clients/venv"
    quietly "$clients/venv/bin/pip" install --disable-pip-version-check \
        --requirement "$sources/requirements.txt"
    printf '%s\n' "$wanted" >"$clients/venv/made-of"
}

fetch_promtool() {
    command -v apt-get >/dev/null ||
        fail "apt-get is needed to fetch Debian's package prometheus"
    refresh_package_lists
    say "fetching promtool"
    fetch prometheus "$scratch/prometheus"
    mv "$scratch/prometheus/usr/bin/promtool" "$clients/promtool"
}

make_scratch "$clients"

install_tools

if [ "$(cat "$clients/venv/made-of" 2>/dev/null)" != "$wanted" ]; then
    make_venv
fi
if ! [ -x "$clients/promtool" ]; then
    fetch_promtool
fi
