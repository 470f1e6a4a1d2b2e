#!/bin/bash
# The demo: a Linux guest on a voted disk of three files. One becomes corrupt under it. Then guest
# and daemon are killed while the guest writes, and one file is missing when they start again.
#
# `make demo` runs it, after tests/guest/prepare.sh and `cargo build --release`. Everything happens
# in a temporary directory. The script checks everything that it prints: if something differs, it
# prints the logs and exits with status 1.

set -euo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
target=$(realpath "${CARGO_TARGET_DIR:-$project/target}")
daemon=$target/release/quorum-blkd
control=$target/release/quorum-blkctl
guest=$target/guest

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' good=$'\e[32m' bad=$'\e[31m' faint=$'\e[2m' plain=$'\e[0m'
else
    bold='' good='' bad='' faint='' plain=''
fi

number=0
step() {
    number=$((number + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$number" "$1" "$plain"
}
tell() { printf '   %s\n' "$@"; }
show() { printf '     %s\n' "$@"; }
command_line() { printf '     %s%s%s\n' "$faint" "$1" "$plain"; }

fail() {
    printf '\n%sThe demo failed: %s%s\n' "$bad" "$1" "$plain" >&2
    for log in daemon.log qemu.log console.log; do
        if [ -s "$directory/$log" ]; then
            printf -- '--- the end of %s\n' "$log" >&2
            tail -n 15 "$directory/$log" >&2
        fi
    done
    exit 1
}

# within SECONDS COMMAND...: repeats a test until it succeeds; fails after SECONDS.
within() {
    local attempts=$(($1 * 20))
    shift
    until "$@"; do
        attempts=$((attempts - 1))
        [ "$attempts" -gt 0 ] || return 1
        sleep 0.05
    done
}

# read_reply SECONDS: reads the guest's output up to "@@ WORD" (see tests/guest/init).
read_reply() {
    local deadline=$((SECONDS + $1)) line='' part=''
    output='' word=''
    while true; do
        if IFS= read -r -t 1 -u "$from_guest" part; then
            line+=$part
            if [[ $line == '@@ '* ]]; then
                word=${line#@@ }
                output=${output%$'\n'}
                output=${output%$'\n'}
                return
            fi
            output+=$line$'\n'
            line=''
        else
            line+=$part
            kill -0 "$qemu_pid" 2>/dev/null || fail "QEMU ended"
            [ "$SECONDS" -lt "$deadline" ] || fail "the guest does not answer"
        fi
    done
}

# in_guest COMMAND: prints the command, runs it, and sets $output to its output.
in_guest() {
    command_line "guest# $1"
    printf '%s\n' "$1" >&"$to_guest"
    read_reply 300
    [ "$word" = 0 ] || fail "in the guest: $1: $output"
}

# start_daemon: prints the command and runs it; waits until the disk is served.
start_daemon() {
    # shellcheck disable=SC1003
    command_line 'host$ quorum-blkd --blk-file 0.raw --blk-file 1.raw --blk-file 2.raw \'
    command_line '          --socket-path disk.sock --rewrite-corrupted --events events.sock'
    : >daemon.log # Else the log of the daemon before it could be read.
    "$daemon" --blk-file 0.raw --blk-file 1.raw --blk-file 2.raw \
        --socket-path disk.sock --rewrite-corrupted --events events.sock 2>daemon.log &
    daemon_pid=$!
    pids+=("$daemon_pid")
    within 300 is_logged 'serving the disk' || fail 'the disk is not served'
}
is_logged() { grep --quiet --fixed-strings "$1" daemon.log; }
show_logged() { show "$(grep --fixed-strings "$1" daemon.log | sed 's/.*disk=quorum0 //')"; }

# boot_guest: starts QEMU and waits for the guest.
boot_guest() {
    local start_ms boot_ms
    rm -f commands.in commands.out
    mkfifo commands.in commands.out
    start_ms=$(date +%s%3N)
    qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
        -accel tcg,thread=multi -smp 2 \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -machine q35,memory-backend=memory \
        -kernel "$guest/vmlinuz" -initrd "$guest/initramfs.cpio.gz" \
        -append 'console=ttyS0 panic=-1 no_timer_check' \
        -serial file:console.log -chardev pipe,id=commands,path=commands -serial chardev:commands \
        -chardev socket,id=disk,path=disk.sock -device vhost-user-blk-pci,chardev=disk \
        </dev/null >qemu.log 2>&1 &
    qemu_pid=$!
    pids+=("$qemu_pid")
    exec {to_guest}<>commands.in {from_guest}<>commands.out
    read_reply 300
    [ "$word" = ready ] || fail "the guest did not get ready: $word"
    boot_ms=$(($(date +%s%3N) - start_ms))
    show "up after $((boot_ms / 1000)).$((boot_ms % 1000 / 100)) s"
}

# first_match PATTERN TEXT: prints the first group that the pattern matches in TEXT, if any.
first_match() {
    if [[ $2 =~ $1 ]]; then
        printf '%s' "${BASH_REMATCH[1]}"
    fi
}

checksums() { sha256sum 0.raw 1.raw 2.raw | sed 's/^\(................\)[^ ]*/\1.../'; }
are_identical() { cmp -s 0.raw 1.raw && cmp -s 0.raw 2.raw; }

pids=()
clean_up() {
    local pid
    for pid in "${pids[@]}"; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null
    rm -rf "$directory"
}

directory=$(mktemp -d)
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
cd "$directory"

[ -x "$daemon" ] || fail "no $daemon: run \`make demo\` or \`cargo build --release\`"
for part in vmlinuz initramfs.cpio.gz; do
    [ -s "$guest/$part" ] || fail "no $guest/$part: run \`make demo\` or tests/guest/prepare.sh"
done

printf '%squorum-blk: one disk out of three files, while one of them lies%s\n' "$bold" "$plain"

step 'Three image files of 64 MiB'
command_line 'host$ truncate --size 64M 0.raw 1.raw 2.raw'
truncate --size 64M 0.raw 1.raw 2.raw

step 'quorum-blkd serves them as one disk'
tell 'It asks all three for every read and lets them vote. Two of three win. The loser' \
    'is repaired, and an event on the events socket reports it.'
start_daemon
# Writes each event, a line of text, to a file as it arrives. Every Debian has Perl.
# shellcheck disable=SC2016
perl -MIO::Socket::UNIX -e '
    $| = 1;
    my $events = IO::Socket::UNIX->new(Peer => "events.sock") or die "events.sock: $!";
    print while <$events>;
' >events.log &
pids+=("$!")

step 'A Linux guest boots with it'
tell 'A stock Debian kernel in QEMU, without KVM: this takes some seconds.'
boot_guest
in_guest 'uname -sr; fdisk -l /dev/vda | head -n 1'
show "${output/$'\n'/$'\n'     }"

step 'The guest makes a file system and writes a letter'
right='Pay 100 crowns to Ada.'
wrong='Pay 999 crowns to Bob.'
in_guest 'mke2fs -b 4096 /dev/vda >/dev/null && mount -o noatime /dev/vda /mnt'
in_guest "echo '$right' >/mnt/letter && sync"
tell 'On the host the three files hold the same:'
within 300 are_identical || fail 'the files differ'
checksums | while IFS= read -r line; do show "$line"; done

step 'Behind its back, 1.raw goes bad where the letter is'
offset=$(LC_ALL=C grep --only-matching --byte-offset --text --fixed-strings "$right" 1.raw |
    head -n 1)
offset=${offset%%:*}
[ -n "$offset" ] || fail 'the letter is not in 1.raw'
sector=$((offset / 512))
command_line "host\$ echo '$wrong' | dd of=1.raw bs=1 seek=$offset conv=notrunc,fsync"
echo "$wrong" | dd of=1.raw bs=1 seek="$offset" conv=notrunc,fsync status=none
for image in 0.raw 1.raw 2.raw; do
    text=$(dd if=$image bs=1 skip="$offset" count=${#right} status=none)
    colour=$good
    [ "$text" = "$right" ] || colour=$bad
    show "$image, sector $sector: $colour$text$plain"
done
[ ! -s events.log ] || fail "an event before anything was read: $(cat events.log)"

step 'The guest forgets what it has in memory and reads the letter again'
in_guest 'echo 3 >/proc/sys/vm/drop_caches; cat /mnt/letter'
show "$good$output$plain"
[ "$output" = "$right" ] || fail "the guest read something else than it had written"
tell 'Two replicas outvoted the third. The guest noticed nothing.'

step 'An event on the events socket has reported it'
within 300 test -s events.log || fail 'there was no event'
event=$(head -n 1 events.log)
show "$event"
name=$(first_match '"node-name":"([^"]*)"' "$event")
bad_runs=$(first_match '"bad-sectors":\[([^]]*)\]' "$event")
sector_reported=$(first_match '"sector-num":([0-9]+)' "$bad_runs")
if [ "$name" != 1.raw ] || [ "$sector_reported" != "$sector" ]; then
    fail "the event should name 1.raw and sector $sector"
fi
tell "In words: in this read, replica $name returned corrupt data for sector $sector_reported."

step 'And 1.raw is repaired'
within 300 are_identical || fail 'the files still differ'
checksums | while IFS= read -r line; do show "$line"; done
tell "${good}The three files are identical again.$plain"

step 'The host loses power while the guest writes'
answer='Paid. Ada has 100 crowns.'
in_guest "echo '$answer' >/mnt/answer && sync"
in_guest 'while sync; do echo "And 1 more. And 2 more. And 3 more." >>/mnt/more; done &'
is_written() { grep --quiet --text --fixed-strings 'And 3 more.' 0.raw; }
within 300 is_written || fail 'the guest writes nothing'
command_line 'host$ kill -9 quorum-blkd qemu'
kill -KILL "$daemon_pid" "$qemu_pid"
wait "$daemon_pid" "$qemu_pid" 2>/dev/null || true
exec {to_guest}>&- {from_guest}<&-
# The kernel ends what they had in flight, and unlocks the images then.
are_unlocked() {
    local text
    text=$("$control" inspect --json 0.raw 1.raw 2.raw) || [ $? = 1 ]
    [[ $text != *'"in-use":true'* ]]
}
within 300 are_unlocked || fail 'the images stay locked'

step 'When the host is up again, 2.raw is not there'
command_line 'host$ mkdir away && mv 2.raw 2.raw.quorum away'
mkdir away && mv 2.raw 2.raw.quorum away
tell 'Beside each image is its record, so quorum-blkd knows that the two others suffice:' \
    'it serves the disk at once, and makes them equal where the guest was writing.'
start_daemon
show_logged 'replica is missing'
is_logged 'replica is missing: its image cannot be opened replica=2.raw' ||
    fail 'the log should say that 2.raw is missing'

step 'The guest boots, and finds what it had synced'
boot_guest
in_guest 'mount -o noatime /dev/vda /mnt && cat /mnt/letter /mnt/answer'
show "$good${output/$'\n'/$'\n'     }$plain"
[ "$output" = "$right"$'\n'"$answer" ] || fail 'the guest read something else than it had synced'
in_guest 'echo "The next letter." >/mnt/next && sync'

step '2.raw comes back'
command_line 'host$ mv away/* .'
mv away/* .
within 300 is_logged 'missing replica is there again' || fail '2.raw was not taken in'
show_logged 'missing replica is there again'
within 300 are_identical || fail 'the files still differ'
checksums | while IFS= read -r line; do show "$line"; done
tell "${good}It got what it had missed, and the three files are identical again.$plain"

printf 'poweroff -f\n' >&"$to_guest"
wait "$qemu_pid" || fail "QEMU's exit status is $?"
kill -TERM "$daemon_pid"
wait "$daemon_pid" || fail "the daemon's exit status is $?"
printf '\nGuest and daemon have ended, nothing is left behind. It took %d s.\n' "$SECONDS"
