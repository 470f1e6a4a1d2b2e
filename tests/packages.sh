# Shared by the scripts that prepare programs for the tests. A script sets $what, the prefix of its
# messages, and calls make_scratch first.

say() {
    printf '%s: %s\n' "$what" "$*"
}

fail() {
    printf '%s: %s\n' "$what" "$*" >&2
    exit 1
}

# quietly COMMAND...: prints the output of the command only if it fails.
quietly() {
    if ! "$@" >"$scratch/output" 2>&1; then
        cat "$scratch/output" >&2
        fail "failed: $*"
    fi
}

# as_root COMMAND...
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

may_be_root() {
    [ "$(id -u)" -eq 0 ] ||
        { command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; }
}

# Package lists may be missing (in a fresh container) or too old to fetch from. Updates them once.
refresh_package_lists() {
    if [ "$lists_are_fresh" = no ] && may_be_root; then
        say "updating the package lists"
        quietly as_root apt-get update
    fi
    lists_are_fresh=yes
}

# install_packages PACKAGE...
install_packages() {
    command -v apt-get >/dev/null && may_be_root ||
        fail "install the contents of these Debian packages first: $*"
    refresh_package_lists
    say "installing $*"
    quietly as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "$@"
}

# fetch PACKAGE DIRECTORY: unpacks the package there without installing it.
fetch() {
    fetch_all "$2" "$1"
}

# fetch_all DIRECTORY PACKAGE...: does so with several packages, which takes less time.
fetch_all() {
    directory=$1
    shift
    mkdir -p "$scratch/packages"
    (cd "$scratch/packages" && quietly apt-get --option APT::Sandbox::User=root download "$@")
    for package in "$@"; do
        quietly dpkg -x "$scratch/packages/$package"_*.deb "$directory"
    done
}

# is_fresh FILE SOURCE...: whether FILE exists and is newer than its sources.
is_fresh() {
    file=$1
    shift
    [ -s "$file" ] && [ -z "$(find "$@" -newer "$file")" ]
}

# make_scratch DIRECTORY: creates it, and in it the directory $scratch for unfinished files, which
# is removed when the script ends.
make_scratch() {
    mkdir -p "$1"
    scratch=$(mktemp -d "$1/scratch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    trap 'exit 1' HUP INT TERM
    lists_are_fresh=no
}
