# A host for the commands of the README: the directories of this one, but a /run of its own, and
# /ssd1 to /ssd4, each a file system of the given kind. For a mount namespace, with which it ends.
set -e
kind=$1
root=/mnt
mount --make-rprivate /
mount -t tmpfs none $root
for place in /*; do
    case $place in
    $root | /run | /ssd[1-4]) ;;
    *)
        if [ -L "$place" ]; then
            cp --no-dereference "$place" $root
        elif [ -d "$place" ]; then
            mkdir "$root$place"
            mount --rbind "$place" "$root$place"
        fi
        ;;
    esac
done
mkdir $root/run
for number in 1 2 3 4; do
    mkdir $root/ssd$number
    if [ "$kind" = tmpfs ]; then
        mount -t tmpfs none $root/ssd$number
    else
        truncate --size=512M $root/disk$number
        "mkfs.$kind" -q $root/disk$number
        mount -o loop $root/disk$number $root/ssd$number
    fi
done
cd $root
exec chroot . bash --noprofile --norc -i
