#!/usr/bin/env bash
# Plays gcloud, kubectl, docker, SLURM's commands, uv and Python for the tests of launch/, as whichever it is started as.
#
# $STAGE is a folder: `calls` gets a line a call; plan/EVENT says what happens next, a line each, shrinking; `slice` holds
# the states that a TPU slice goes through, the last of which stays; worker0 and worker1 are the homes of its workers.
set -euo pipefail

lock() { until mkdir "$STAGE/lock" 2> /dev/null; do :; done; }
unlock() { rmdir "$STAGE/lock"; }

# The first line of a file, which loses it: the next event, or nothing. With "keep" the last line stays.
take() {
    local lines=()
    lock
    if [[ -e $1 ]]; then mapfile -t lines < "$1"; fi
    if ((${#lines[@]} > 1)); then printf '%s\n' "${lines[@]:1}" > "$1"; elif [[ ${2:-} != keep ]]; then rm -f "$1"; fi
    unlock
    printf '%s' "${lines[0]-}"
}

refuse() {
    echo "$name: $*" >&2
    exit 1
}

# Which flags a command must have, then those it may have, as its --help lists them.
flags_of() {
    case $1 in
        'queued-resources create') echo 'node-id accelerator-type runtime-version zone | project spot' ;;
        'tpu-vm create') echo 'accelerator-type version zone | project spot' ;;
        'queued-resources list' | 'tpu-vm list') echo 'filter format zone | project' ;;
        'queued-resources delete') echo 'force quiet zone | project' ;;
        'tpu-vm delete') echo 'quiet zone | project' ;;
        'tpu-vm ssh') echo 'worker command zone | project' ;;
        'tpu-vm scp') echo 'worker zone | project' ;;
        *) refuse "unknown command $1" ;;
    esac
}

check_flags() {
    local known given='' flag word
    known=$(flags_of "$1")
    for word in "${@:2}"; do
        if [[ $word == --* ]]; then
            flag=${word#--} given+=" ${flag%%=*} "
            [[ " $known " == *" ${flag%%=*} "* ]] || refuse "$1 has no $word"
        fi
    done
    for flag in ${known%%|*}; do [[ $given == *" $flag "* ]] || refuse "$1 needs --$flag"; done
}

value() { # of --FLAG=VALUE
    local word
    for word in "${@:2}"; do if [[ $word == "--$1="* ]]; then printf '%s' "${word#*=}"; fi; done
}

gcloud() {
    [[ $1 == compute && $2 == tpus ]] || refuse "unknown command $*"
    check_flags "${*:3:2}" "${@:5}"
    local now worker status=0
    case $4 in
        list) take "$STAGE/slice" keep && return ;;
        create)
            if [[ -e $STAGE/slice ]]; then refuse 'already exists'; fi
            now=$(take "$STAGE/plan/slices")
            if [[ -z $now && $3 == tpu-vm ]]; then now=READY; fi
            tr ' ' '\n' <<< "${now:-WAITING_FOR_RESOURCES ACTIVE}" > "$STAGE/slice"
            for worker in 0 1; do cp -R "$STAGE/image" "$STAGE/worker$worker"; done
            return
            ;;
        delete) rm -r "$STAGE"/slice "$STAGE"/worker* && return ;;
    esac
    now=$(cat "$STAGE/slice" 2> /dev/null) || refuse 'not found'
    if [[ ! $now =~ ^(ACTIVE|READY)$ || $(take "$STAGE/plan/connections") == lost ]]; then refuse 'could not connect'; fi
    worker=$(value worker "$@")
    for worker in ${worker/all/0 1}; do
        if [[ $4 == scp ]]; then
            cp "$5" "$STAGE/worker$worker/${6#*:}"
        else
            (cd "$STAGE/worker$worker" && HOME=$PWD exec bash -c "$(value command "$@")") || status=$?
        fi
    done
    return "$status"
}

uv() {
    if [[ $1 == venv ]]; then
        mkdir -p "${!#}/bin"
        ln -sf "$STAGE/bin/python" "${!#}/bin/python"
        echo "PATH=$PWD/${!#}/bin:\$PATH" > "${!#}/bin/activate"
    fi
}

# convattn_jax.main: ends with the status planned, or is stopped, with or without its machine, or waits for SIGTERM.
python() {
    local ends=0
    trap 'echo saved >> "$STAGE/saved"; exit 0' TERM
    if [[ $PWD != */worker1/* ]]; then ends=$(take "$STAGE/plan/runs"); fi
    echo training
    case ${ends:=0} in
        preempted) echo SUSPENDED > "$STAGE/slice" && kill -KILL "$PPID" ;;
        stopped) kill -KILL "$PPID" ;;
        wait) echo $$ > "$STAGE/waiting" && while :; do /bin/sleep 0.02; done ;;
        *) return "$ends" ;;
    esac
}

# What is planned for "NAME VERB" or "NAME": a text to print, or a status.
other() {
    local said
    said=$(take "$STAGE/plan/$name ${1:-}")
    if [[ -z $said ]]; then said=$(take "$STAGE/plan/$name"); fi
    if [[ $said =~ ^[1-9]$ ]]; then return "$said"; fi
    if [[ -n $said ]]; then echo "$said"; fi
}

name=${0##*/}
printf '%s' "$name" "${@/#/$'\x1f'}" $'\n' >> "$STAGE/calls"
if [[ ${!#} == --filename=- ]]; then cat > "$STAGE/stdin"; fi
case $name in
    gcloud | uv | python) "$name" "$@" ;;
    tail) exec /usr/bin/tail --sleep-interval=0.02 "$@" ;;
    *) other "$@" ;;
esac
