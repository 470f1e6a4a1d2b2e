# What the situations of list.txt use. Each runs in a directory with the images a.raw, b.raw, c.raw.

three="--blk-file a.raw --blk-file b.raw --blk-file c.raw"
export QUORUM_BLK_QMP="$PWD/qmp.sock"
daemons=
trap 'for daemon in $daemons; do kill "$daemon"; done; wait' EXIT

# A start that is to be refused.
start() {
    timeout 60 quorum-blkd "$@"
}

refuse() {
    start --socket-path disk.sock "$@"
}

# A start in the background, with a monitor.
serve() {
    timeout 200 quorum-blkd --socket-path disk.sock --qmp qmp.sock "$@" &
    daemons="$daemons $!"
    until [ -S disk.sock ] || ! kill -0 $!; do
        sleep 0.05
    done
}

# Equal images with data, and then a difference in b.raw.
make_corrupt() {
    for image in a.raw b.raw c.raw; do
        seq 1000 | dd of=$image conv=notrunc status=none
    done
    printf x | dd of=b.raw conv=notrunc status=none
}

ctl() {
    quorum-blkctl "$@"
}

# A command of the monitor, with its arguments as a JSON object.
monitor() {
    python3 - "$@" <<'END'
import json, socket, sys
client = socket.socket(socket.AF_UNIX)
client.settimeout(200)
client.connect("qmp.sock")
lines = client.makefile("rw")
lines.readline()
command, arguments = sys.argv[1:]
for request in (
    {"execute": "qmp_capabilities"},
    {"execute": command, "arguments": json.loads(arguments)},
):
    lines.write(json.dumps(request) + "\n")
    lines.flush()
    print(lines.readline())
END
}
