# Completion of quorum-blkctl in Bash. The program says what may come next.

_quorum_blkctl() {
    local rest=${COMP_LINE:0:COMP_POINT} words=() current cut kind word i
    # Bash also cuts words at some characters within a name or --option=value.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if ((i == 0)) || [[ $rest == [[:blank:]]* ]]; then
            words+=("")
        fi
        rest=${rest#"${rest%%[![:blank:]]*}"}
        if ((i == COMP_CWORD)); then
            words[-1]+=$rest
        else
            words[-1]+=${COMP_WORDS[i]}
            rest=${rest#"${COMP_WORDS[i]}"}
        fi
    done
    # It replaces only what is behind the last of them.
    current=${words[-1]}
    cut=${current%"${current##*[=:@]}"}
    COMPREPLY=()
    {
        read -r kind
        if [[ $kind == files ]]; then
            compopt -o default
            return
        fi
        while IFS=$'\t' read -r word _; do
            word=${word#"$cut"}
            [[ $current == [\"\']* ]] || printf -v word %q "$word"
            COMPREPLY+=("$word")
        done
    } <<<"$(QUORUM_BLKCTL_COMPLETE=quoted "$1" "${words[@]}" 2>/dev/null)"
    # Without an answer, there is an empty word.
    [[ -n $kind && -n ${COMPREPLY[*]} ]] || COMPREPLY=()
}

complete -F _quorum_blkctl quorum-blkctl
