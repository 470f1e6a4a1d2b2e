# Completion of quorum-blkctl in fish. The program says what may come next.

function __quorum_blkctl_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -l answer (QUORUM_BLKCTL_COMPLETE=1 $before[1] $before "$current" 2>/dev/null)
    if test "$answer[1]" = files
        set -l option (string match -r -- '^-[^=]*=' "$current")
        set -l path (string replace -r -- '^-[^=]*=' '' "$current")
        string join \n -- "$option"(__fish_complete_path "$path")
    else if set -q answer[2]
        string join \n -- $answer[2..]
    end
end

complete --command quorum-blkctl --no-files --keep-order --arguments '(__quorum_blkctl_complete)'
