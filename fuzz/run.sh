#!/usr/bin/env bash
# run.sh [target...]: runs each fuzz target for $SECONDS_EACH, and fails if one finds a broken rule.
# run.sh --corpus [target...]: replaces each corpus by the fewest inputs that reach as much code as
# all inputs do.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_EACH:-60}
cargo=${CARGO:-cargo}

make_corpus=
if [ "${1:-}" = --corpus ]; then
    make_corpus=yes
    shift
fi
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    targets=(request device message monitor record)
fi

if ! "$cargo" fuzz --version >/dev/null 2>&1; then
    "$cargo" install --locked cargo-fuzz
fi
# A stable toolchain offers sanitizers only with RUSTC_BOOTSTRAP. FUZZ_STABLE=1 uses it even if
# there is a nightly one.
toolchain=()
if [ -z "${FUZZ_STABLE:-}" ] && rustup toolchain list 2>/dev/null | grep -q '^nightly'; then
    toolchain=(+nightly)
else
    export RUSTC_BOOTSTRAP=1
fi

fuzz() {
    local target=$1
    shift
    "$cargo" "${toolchain[@]}" fuzz run "$target" "$@" \
        -max_len=4096 -len_control=20 -rss_limit_mb=1024 -timeout=10
}

if [ -n "$make_corpus" ]; then
    QUORUM_BLK_FUZZ_SEEDS=1 "$cargo" test --locked --quiet --test fuzz
fi
status=0
for target in "${targets[@]}"; do
    corpus=fuzz/corpus/$target
    work=fuzz/work/$target
    mkdir -p "$work" "$corpus"
    if [ -n "$make_corpus" ]; then
        least=fuzz/work/$target.least
        rm -rf "$least"
        mkdir "$least"
        fuzz "$target" "$least" "$corpus" "$work" -- -set_cover_merge=1 -use_counters=0
        rm -rf "$corpus"
        mv "$least" "$corpus"
    else
        echo "== $target, $seconds s"
        fuzz "$target" "$work" "$corpus" -- -max_total_time="$seconds" -print_final_stats=1 ||
            status=$?
    fi
done
exit "$status"
