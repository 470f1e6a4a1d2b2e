#!/usr/bin/env bash
# Breaks one rule of the contract at a time, in a copy of the tree, and expects a test to fail.
#
# Each patch here is a mutant. Its header names the rule, says how the patch breaks it, and names
# the test that fails then:
#
#   Rule: W3
#   Breaks: A replica that failed a write goes on voting.
#   Caught-by: sim
#
# `sim` is the random runs of the simulator, for SECONDS_EACH seconds at most; `sim NAME` is the
# tests of that name in tests/sim; `unit NAME` and `program NAME` are the unit tests of that name
# and those in tests/program; `threads NAME` is the
# tests of that name in tests/replicas, with `--aio threads`; `exhaustive NAME` is the tests of that
# name in tests/exhaustive; `crash CLASS` is the crash laboratory with that class of disk, for
# SECONDS_EACH seconds.
#
# ONLY='name name' runs only these. The exit status is 1 if a mutant survives.
set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
work=$top/target/mutants
tree=$work/tree
log=$work/log
seconds=${SECONDS_EACH:-60}
only=${ONLY:-}
export CARGO_TARGET_DIR=$work/target CARGO_INCREMENTAL=1 CARGO_TERM_COLOR=never

# Copies what has changed since the last time, with a new date: cargo builds by date.
copy_tree() {
	mkdir -p "$tree"
	(cd "$top" && git ls-files --cached --others --exclude-standard) | sort >"$work/files"
	(cd "$tree" && find . -type f | sed 's|^\./||') | sort | comm -13 "$work/files" - |
		while read -r file; do rm "$tree/$file"; done
	while read -r file; do
		[ -e "$top/$file" ] || continue
		cmp --silent "$top/$file" "$tree/$file" && continue
		mkdir -p "$(dirname "$tree/$file")"
		cp "$top/$file" "$tree/$file"
	done <"$work/files"
}

# patch_tree FILE [OPTION...]: applies a mutant to the copy; cargo sees the new date of each file.
patch_tree() {
	local file=$1
	shift
	patch --silent --strip 1 --fuzz 0 --no-backup-if-mismatch --directory "$tree" "$@" <"$file"
}

header() { sed --quiet "s/^$2: //p" "$1"; }

# cargo_test KIND NAME [OPTION...]: the tests that a header names.
cargo_test() {
	local kind=$1 name=$2
	shift 2
	case $kind in
	sim) set -- --test sim "$@" -- "${name:-keeps_the_contract}" ;;
	unit) set -- --lib "$@" -- "$name" ;;
	program) set -- --test program "$@" -- "$name" ;;
	exhaustive) set -- --test exhaustive "$@" -- "$name" ;;
	threads) set -- --test replicas "$@" -- "$name" ;;
	crash) set -- --test crash "$@" -- nothing_flushed_is_lost ;;
	*) echo "Caught-by: $kind is no kind of test; see above" >&2 && exit 2 ;;
	esac
	# A mutant may make a test wait for ever.
	(cd "$tree" && export QUORUM_BLK_SIM_SECONDS=$seconds QUORUM_BLK_TEST_AIO=threads &&
		export QUORUM_BLK_CRASH_SECONDS=$seconds QUORUM_BLK_CRASH_CLASS=$name &&
		timeout $((seconds + 900)) \
			cargo test --locked --quiet --profile mutants --features sim "$@") >"$log" 2>&1
}

# What the failing test has said, in a few words: after how many seeds, and which rule is broken.
cause() {
	local seeds what='^seed [0-9]+ after|^crash: .*, [1-9][0-9]* failed|panicked at|SIGABRT'
	seeds=$(sed --quiet -E 's/^([0-9]+) seeds, .*/\1 seeds: /p' "$log" | head -n 1)
	grep --max-count 1 -E "$what" "$log" |
		sed -E "s/^seed [0-9]+ after [0-9]+ steps: /$seeds/" | cut -c 1-100
}

copy_tree
survivors=0 mutants=0
trap copy_tree EXIT
printf '%-32s %-5s %-12s %6s  %s\n' mutant rule result seconds cause
for patch in "$tree"/tests/mutants/*.patch; do
	name=$(basename "$patch" .patch)
	[ -z "$only" ] || [[ " $only " == *" $name "* ]] || continue
	mutants=$((mutants + 1))
	read -r kind test < <(header "$patch" Caught-by) || true
	began=$SECONDS
	if ! patch_tree "$patch" --dry-run >"$log" 2>&1; then
		result='no patch'
	elif ! patch_tree "$patch"; then
		exit 2
	elif ! cargo_test "$kind" "$test" --no-run; then
		result='no build'
	elif cargo_test "$kind" "$test"; then
		result=survives
	else
		result=caught
	fi
	[ "$result" = 'no patch' ] || patch_tree "$patch" --reverse
	[ "$result" = caught ] || survivors=$((survivors + 1))
	printf '%-32s %-5s %-12s %6d  %s\n' "$name" "$(header "$patch" Rule)" "$result" \
		$((SECONDS - began)) "$([ "$result" = survives ] || cause || head -n 1 "$log")"
done
[ "$mutants" -gt 0 ] || { echo "no mutant is named $only" >&2 && exit 2; }
echo "$mutants mutants, $survivors not caught"
[ "$survivors" = 0 ]
