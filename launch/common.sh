# shellcheck shell=bash disable=SC2034
# What the launch scripts share: printing a command instead of running it, and stopping with one line.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=no

# The words as one line that a shell reads back as the same words.
quote() {
    local word line=''
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command, or prints it.
run() {
    if [[ $dry_run == yes ]]; then quote "$@"; else "$@"; fi
}

# A remark: on stderr, or among the printed commands as a comment.
note() {
    if [[ $dry_run == yes ]]; then printf '# %s\n' "$*"; else printf '# %s\n' "$*" >&2; fi
}

# One line on stderr; status 2, as convattn_jax.main ends when the user can mend it.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Stops with one line unless every variable named has a value.
need() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || fail "$name is not set: give it before the command, as in $name=... ${0##*/} (see --help)"
    done
}

# Stops with one line unless every setting, given as NAME=LEAST, is a whole number from LEAST on.
whole() {
    local pair name value
    for pair in "$@"; do
        name=${pair%%=*} value=${!name}
        if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < ${pair#*=})); then
            fail "$name=$value must be a whole number from ${pair#*=} on"
        fi
    done
}

# Stops with one line unless every setting named is of the characters that names, paths and image references have.
plain() {
    local name
    for name in "$@"; do
        [[ ${!name:-} =~ ^[A-Za-z0-9._:/@,-]*$ ]] || fail "$name=${!name} has a character that no name has"
    done
}

# Stops with one line unless every setting named is yes or no.
yes_or_no() {
    local name
    for name in "$@"; do
        [[ ${!name} == yes || ${!name} == no ]] || fail "$name=${!name} must be yes or no"
    done
}

# Takes --help and --dry-run out of the arguments, wherever they stand; what is left is in `words`.
options() {
    local word
    words=()
    for word in "$@"; do
        case $word in
            --help | -h) usage && exit ;;
            --dry-run) dry_run=yes ;;
            --dryrun | --dry_run | -n) fail "$word is no option; did you mean --dry-run?" ;;
            *) words+=("$word") ;;
        esac
    done
}

# Stops with one line unless the words, the arguments of convattn_jax.main, say what is to be run.
need_config() {
    local word
    for word in "$@"; do
        case $word in --config | --config=?*) return ;; esac
    done
    fail 'what is to be run? such as --config=configs/composite.py (see --help)'
}

# Stops with one line if anything stands behind a step that takes nothing.
need_nothing() {
    local step=$1
    shift
    (($# == 0)) || fail "$step takes no arguments, such as $1 (see --help)"
}
