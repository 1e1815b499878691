#!/usr/bin/env bash
# A run on this machine, from a fresh clone: makes .venv once, then uses all devices there are.
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"

usage() {
    cat <<'HELP'
usage: [SETTING=VALUE ...] launch/local.sh [--dry-run] ARGUMENTS

  launch/local.sh --config=configs/composite.py

installs this code in .venv, the first time and for other EXTRAS, and runs python -m convattn_jax.main ARGUMENTS.

settings
  EXTRAS     what to install with it: cuda, tpu, gcs, ... (commas between)  [cuda where there is an NVIDIA GPU]
  DEVICES    pretend that the CPU is that many devices, to try a mesh
  PROCESSES  run as that many processes, one GPU each (or DEVICES), as NVIDIA advises where there are several
             [1, with all devices]
  PORT       where they meet                                                [one between 20000 and 32000]

  --dry-run  print the commands, ready to be pasted, and run none
HELP
}

options "$@"
need_config ${words[@]+"${words[@]}"}
# Two runs on one machine must not meet; below where systems begin to hand out ports of their own.
PROCESSES=${PROCESSES:-1} PORT=${PORT:-$((20000 + RANDOM % 12000))}
whole PROCESSES=1 PORT=1
((PORT <= 65535)) || fail "PORT=$PORT is above 65535, the last there is"
plain EXTRAS
if [[ -n ${DEVICES:-} ]]; then whole DEVICES=1; fi
if [[ -z ${EXTRAS+set} ]] && command -v nvidia-smi > /dev/null; then EXTRAS=cuda; fi

run cd "$repository"
installed=.venv/installed${EXTRAS:+-$EXTRAS}
if [[ ! -e $repository/$installed ]]; then
    run python3 -m venv .venv
    run .venv/bin/python -m pip install --quiet --editable ".${EXTRAS:+[$EXTRAS]}"
    run touch "$installed"
fi

main=(.venv/bin/python -m convattn_jax.main "${words[@]}")
settings=()
if [[ -n ${DEVICES:-} ]]; then
    settings=(JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$DEVICES")
fi
if ((PROCESSES == 1)); then
    run env ${settings[@]+"${settings[@]}"} "${main[@]}"
    exit
fi

trap 'kill -TERM $(jobs -p) 2> /dev/null' TERM
trap : INT # Ctrl-C reaches the processes by itself; they save, and are waited for
others=()
for ((i = 0; i < PROCESSES; i++)); do
    mine=(env)
    if ((${#settings[@]})); then mine+=("${settings[@]}"); else mine+=(JAX_LOCAL_DEVICE_IDS="$i"); fi
    mine+=("${main[@]}" "--coordinator=localhost:$PORT" "--processes=$PROCESSES" "--process=$i")
    if [[ $dry_run == yes ]]; then
        printf '%s &\n' "$(quote "${mine[@]}")"
    else
        "${mine[@]}" &
        others+=($!)
    fi
done
if [[ $dry_run == yes ]]; then echo wait && exit; fi
# One that has failed the others would wait for: they have ten seconds to end by themselves.
status=0 patience=50
while ((${#others[@]})); do
    left=()
    for process in "${others[@]}"; do
        if kill -0 "$process" 2> /dev/null; then
            left+=("$process")
        else
            ended=0
            wait "$process" || ended=$?
            ((status)) || status=$ended
        fi
    done
    others=(${left[@]+"${left[@]}"})
    if ((status && ${#others[@]} && --patience == 0)); then kill -TERM "${others[@]}" 2> /dev/null || true; fi
    sleep 0.2
done
exit "$status"
