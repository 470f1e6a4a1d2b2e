#!/usr/bin/env bash
# Runs the fuzz targets: run.sh [--minimise] [target...], for $SECONDS_EACH each. Fails if one finds something.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_EACH:-60}
cargo=${CARGO:-cargo}

minimise=
if [ "${1:-}" = --minimise ]; then
    minimise=yes
    shift
fi
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    targets=(request device message)
fi

if ! "$cargo" fuzz --version >/dev/null 2>&1; then
    "$cargo" install --locked cargo-fuzz
fi
# Sanitizers are not for stable toolchains; one that is made to have them does.
if [ -z "${FUZZ_STABLE:-}" ] && "$cargo" +nightly --version >/dev/null 2>&1; then
    toolchain=+nightly
else
    toolchain=
    export RUSTC_BOOTSTRAP=1
fi

fuzz() {
    "$cargo" $toolchain fuzz "$@"
}

status=0
for target in "${targets[@]}"; do
    corpus=fuzz/corpus/$target
    work=fuzz/work/$target
    mkdir -p "$work"
    options=(-max_len=4096 -len_control=20 -rss_limit_mb=1024 -timeout=10)
    if [ -n "$minimise" ]; then
        # What is in the corpus comes first, so that names stay.
        fuzz run "$target" "$work" "$corpus" -- "${options[@]}" -merge=1
        rm -rf "$work.least"
        mkdir "$work.least"
        fuzz run "$target" "$work.least" "$corpus" "$work" -- "${options[@]}" -merge=1
        continue
    fi
    echo "== $target, $seconds s"
    fuzz run "$target" "$work" "$corpus" -- "${options[@]}" -max_total_time="$seconds" -print_final_stats=1 || status=$?
done
exit "$status"
