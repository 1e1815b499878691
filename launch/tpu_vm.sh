#!/usr/bin/env bash
# A run on the TPU VMs of one Cloud TPU slice, from asking for it to its last line, preempted or not.
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"

usage() {
    cat <<'HELP'
usage: SETTING=VALUE ... launch/tpu_vm.sh [--dry-run] STEP [ARGUMENTS]

  ZONE=us-west4-a TYPE=v5litepod-16 SPOT=yes launch/tpu_vm.sh train \
      --config=configs/composite.py --workdir=gs://BUCKET/runs/composite

steps; ARGUMENTS are those of python -m convattn_jax.main
  train ARGUMENTS  all that follow but delete, and again from the checkpoint whenever the slice is preempted;
                   typed again, it goes on following a run that is at work
  create           ask for the slice
  wait             until it is there
  copy             the code (convattn_jax/ and configs/) to every worker
  install          its dependencies, on every worker
  run ARGUMENTS    the command on every worker, detached: it outlives this shell; what was at work there is killed
  log              follow the output of one worker until the run ends; exits as the run did
  delete           the slice with its disks: copy first what is not on gs://

settings
  ZONE, TYPE       where, and what: v5litepod-256, v6e-16, v5p-8, v4-32, ...   (required)
  NAME             of the slice                                          [convattn]
  PROJECT          the Google Cloud project                              [gcloud's own]
  VERSION          the software of the TPU VMs                           [the one meant for TYPE]
  SPOT=yes         cheaper, may be preempted: --workdir must be on gs:// [no]
  QUEUED=no        create TPU VMs at once or fail, instead of queueing   [yes]
  WORKER           whose output log follows                              [0]
  RESTARTS         by train, after failures; preemptions don't count     [3]
  POLL             seconds between two looks at what is waited for       [30]

  --dry-run        print the commands of a step, ready to be pasted, and run none
HELP
}

NAME=${NAME:-convattn} PROJECT=${PROJECT:-} SPOT=${SPOT:-no} QUEUED=${QUEUED:-yes}
WORKER=${WORKER:-0} RESTARTS=${RESTARTS:-3} POLL=${POLL:-30}

version() {
    case $TYPE in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

# gcloud compute tpus KIND VERB NAME, in the zone and project of the settings.
tpus() {
    local kind=$1 verb=$2
    shift 2
    run gcloud compute tpus "$kind" "$verb" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

on_worker() {
    tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

create() {
    local spot=''
    if [[ $SPOT == yes ]]; then spot=--spot; fi
    if [[ $QUEUED == yes ]]; then
        tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
            --runtime-version="${VERSION:-$(version)}" ${spot:+"$spot"}
    else
        tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="${VERSION:-$(version)}" ${spot:+"$spot"}
    fi
}

# What the slice is doing; empty where there is none. (describe would fail alike for a lost network and a lost slice.)
state() {
    local kind=tpu-vm field=state
    if [[ $QUEUED == yes ]]; then kind=queued-resources field=state.state; fi
    tpus "$kind" list --filter="name~/$NAME\$" --format="value($field)"
}

# Status: 0 once the slice is there, 75 if it is gone, 1 if it will never come.
await() {
    local now
    if [[ $dry_run == yes ]]; then
        note "every $POLL seconds, until it prints ACTIVE or READY:"
        state
        return
    fi
    while now=$(state); do
        case $now in
            ACTIVE | READY) return ;;
            FAILED) note "$NAME is FAILED: see gcloud compute tpus queued-resources describe $NAME" && return 1 ;;
            '' | SUSPEND* | PREEMPTED | TERMINATED | STOP* | DELETING) note "$NAME is gone ${now:+($now)}" && return 75 ;;
        esac
        note "$NAME is $now; looking again in $POLL seconds"
        sleep "$POLL"
    done
    return 1
}

copy() {
    local archive=${TMPDIR:-/tmp}/$NAME.tgz
    run tar -czf "$archive" -C "$repository" --exclude=__pycache__ pyproject.toml README.md LICENSE convattn_jax configs &&
        tpus tpu-vm scp "$archive" "$NAME:convattn_jax.tgz" --worker=all &&
        on_worker all 'mkdir -p convattn_jax && cd convattn_jax && rm -rf convattn_jax configs && tar -xzf ../convattn_jax.tgz'
}

# uv brings a Python of its own: that of the TPU VMs may be too old.
install_code() {
    on_worker all "cd convattn_jax && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&\
 ~/.local/bin/uv venv --quiet --allow-existing --python=3.12 .venv &&\
 ~/.local/bin/uv pip install --quiet --python=.venv/bin/python --editable '.[tpu,gcs]'"
}

# The shell around the command notes how it ended. One that a shutdown stops dies first and notes nothing. A process that
# waits for peers which are gone would keep the TPU from the next one.
run_command() {
    local command='. .venv/bin/activate; python -m convattn_jax.main "$@"; echo $? > run.status'
    on_worker all "cd convattn_jax && { kill -KILL -- -\$(cat run.pid); rm -f run.status; } 2> /dev/null;\
 { nohup setsid sh -c $(quote "$command") $(quote run "$@") > run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}

# What became of the run: its exit status, "running", or "stopped" if it is neither at work nor ended by itself.
# shellcheck disable=SC2016
progress() {
    on_worker "$WORKER" 'cd convattn_jax && { cat run.status || { kill -0 "$(cat run.pid)" && echo running; } ||'"\
 echo stopped; } 2> /dev/null"
}

# Status: that of the run; 143 if something stopped it; 75 if the slice is gone.
follow() {
    local lines=+1 ended now
    while :; do
        on_worker "$WORKER" "cd convattn_jax && tail --lines=$lines --pid=\"\$(cat run.pid)\" -F run.log" || true
        if [[ $dry_run == yes ]]; then
            note 'then, what became of it:'
            progress
            return
        fi
        ended=$(progress) || ended=unknown
        case $ended in
            [0-9]*) return "$ended" ;;
            stopped) return 143 ;;
        esac
        now=$(state) || now=unknown
        case $now in
            ACTIVE | READY | unknown) ;;
            *) return 75 ;;
        esac
        note 'the connection was lost; following again'
        lines=10
        sleep "$POLL"
    done
}

delete() {
    if [[ $QUEUED == yes ]]; then
        tpus queued-resources delete "$NAME" --force --quiet
    else
        tpus tpu-vm delete "$NAME" --quiet
    fi
}

# Makes sure that a slice is there or asked for: one that was preempted has to be deleted before it is asked for again.
ask() {
    local now
    if [[ $dry_run == yes ]]; then create && return; fi
    while now=$(state); do
        case $now in
            '') create && return ;;
            SUSPENDING | DELETING | STOPPING) sleep "$POLL" ;;
            FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) delete && create && return ;;
            *) return ;;
        esac
    done
    return 1
}

start() {
    if [[ $dry_run == no && $(progress || true) == running ]]; then return; fi
    copy && install_code && run_command "$@"
}

train() {
    local status now
    if [[ " $* " != *" --workdir=gs://"* ]]; then
        [[ $SPOT == no ]] || fail '--workdir is not on gs://: SPOT=yes would lose the run'
        local chips=${TYPE##*-}
        [[ ! $chips =~ ^[0-9]+$ ]] || ((chips <= 8)) ||
            fail "--workdir is not on gs://: the hosts of $TYPE share no other folder"
    fi
    ask
    while :; do
        status=0
        { await && start "$@" && follow; } || status=$?
        if ((status == 0 || status == 2)); then return "$status"; fi # 2: what the user has to mend
        now=$(state) || now=unknown
        case $now in
            FAILED) return "$status" ;;
            '' | SUSPEND* | PREEMPTED | TERMINATED | STOP* | DELETING) note 'preempted; going on from the last checkpoint' ;;
            *)
                ((RESTARTS-- > 0)) || return "$status"
                note "ended with status $status; starting it again"
                ;;
        esac
        ask
    done
}

options "$@"
whole WORKER=0 RESTARTS=0 POLL=1
yes_or_no SPOT QUEUED
step=${words[0]:-}
case $step in
    train | create | wait | copy | install | run | log | delete) need ZONE ;;
    '') fail 'which step? train, create, wait, copy, install, run, log or delete (see --help)' ;;
    *) fail "$step is no step: train, create, wait, copy, install, run, log or delete (see --help)" ;;
esac
if [[ $step == create || $step == train ]]; then need TYPE; fi
plain ZONE TYPE NAME PROJECT VERSION
arguments=("${words[@]:1}")
case $step in
    train | run) need_config ${arguments[@]+"${arguments[@]}"} ;;
    *) need_nothing "$step" ${arguments[@]+"${arguments[@]}"} ;;
esac
case $step in
    wait) await ;;
    install) install_code ;;
    run) run_command ${arguments[@]+"${arguments[@]}"} ;;
    log) follow ;;
    train) train ${arguments[@]+"${arguments[@]}"} ;;
    *) "$step" ;;
esac
