#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster that has JobSet: the pods of launch/jobset.yaml, which resume after preemption.
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"

usage() {
    cat <<'HELP'
usage: SETTING=VALUE ... launch/gke.sh [--dry-run] STEP [ARGUMENTS]

  IMAGE=REGISTRY/convattn:1 launch/gke.sh build
  IMAGE=REGISTRY/convattn:1 TYPE=tpu-v6e-slice TOPOLOGY=4x4 launch/gke.sh run \
      --config=configs/composite.py --workdir=gs://BUCKET/runs/composite
  launch/gke.sh log

steps; ARGUMENTS are those of python -m convattn_jax.main
  build          the image, of launch/Dockerfile, and push it
  run ARGUMENTS  a JobSet of one pod a host; preempted pods start anew, and go on from the checkpoint
  log            follow the first host's output until the JobSet has completed (status 0) or failed (1)
  delete         the JobSet with its pods

settings
  IMAGE            what build pushes and run pulls (required there)
  TYPE, TOPOLOGY   the node pool's labels: gke-tpu-accelerator and gke-tpu-topology (required by run)
  CHIPS            TPU chips of one host                              [4]
  NAME             of the JobSet                                      [convattn]
  NAMESPACE        in the cluster that kubectl is set to              [default]
  SERVICE_ACCOUNT  of the pods; it has to reach gs://                 [default]
  SPOT=yes         spot nodes only                                    [no]
  RESTARTS         after failures; preemptions don't count            [3]
  POLL             seconds between two looks at what is waited for    [30]

  --dry-run        print the commands of a step, ready to be pasted, and run none
HELP
}

NAME=${NAME:-convattn} POLL=${POLL:-30} CHIPS=${CHIPS:-4} SPOT=${SPOT:-no} RESTARTS=${RESTARTS:-3}
namespace=--namespace=${NAMESPACE:-default}

# jobset.yaml with the words between @ filled in.
manifest() {
    local yaml spot='' list='' word
    if [[ $SPOT == yes ]]; then spot='cloud.google.com/gke-spot: "true"'; fi
    for word in "$@"; do
        list+="${list:+, }\"$(printf '%s' "$word" | sed 's/[\\"]/\\&/g')\""
    done
    yaml=$(< "$repository/launch/jobset.yaml")
    yaml=${yaml//@NAME@/"$NAME"}
    yaml=${yaml//@RESTARTS@/"$RESTARTS"}
    yaml=${yaml//@HOSTS@/"$((${TOPOLOGY//x/*} / CHIPS))"}
    yaml=${yaml//@SERVICE_ACCOUNT@/"${SERVICE_ACCOUNT:-default}"}
    yaml=${yaml//@TYPE@/"$TYPE"}
    yaml=${yaml//@TOPOLOGY@/"$TOPOLOGY"}
    yaml=${yaml//@SPOT@/"$spot"}
    yaml=${yaml//@IMAGE@/"$IMAGE"}
    yaml=${yaml//@CHIPS@/"$CHIPS"}
    printf '%s\n' "${yaml//@ARGUMENTS@/"[$list]"}"
}

run_jobset() {
    local chips
    [[ $TOPOLOGY =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})+$ ]] || fail "TOPOLOGY=$TOPOLOGY is none: write it as 4x4 or 2x2x4"
    chips=$((${TOPOLOGY//x/*}))
    ((chips % CHIPS == 0)) || fail "TOPOLOGY=$TOPOLOGY has $chips chips, which hosts of CHIPS=$CHIPS don't make up"
    [[ " $* " == *" --workdir=gs://"* ]] || fail '--workdir is not on gs://: the run would be lost with its pods'
    if [[ $dry_run == yes ]]; then
        printf "%s <<'JOBSET'\n%s\nJOBSET\n" "$(quote kubectl apply "$namespace" --filename=-)" "$(manifest "$@")"
    else
        manifest "$@" | kubectl apply "$namespace" --filename=-
    fi
}

follow() {
    local state
    while :; do
        run kubectl logs "$namespace" --follow --tail=-1 \
            --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" || true
        if [[ $dry_run == yes ]]; then note 'again, until it has ended as this says:'; fi
        state=$(run kubectl get jobset "$NAME" "$namespace" --output='jsonpath={.status.terminalState}')
        if [[ $dry_run == yes ]]; then echo "$state" && return; fi
        case $state in
            Completed) return 0 ;;
            Failed) return 1 ;;
        esac
        note "$NAME is waiting for its nodes, or starting anew; looking again in $POLL seconds"
        sleep "$POLL"
    done
}

options "$@"
whole CHIPS=1 RESTARTS=0 POLL=1
yes_or_no SPOT
step=${words[0]:-}
case $step in
    build) need IMAGE ;;
    run) need IMAGE TYPE TOPOLOGY ;;
    log | delete) ;;
    '') fail 'which step? build, run, log or delete (see --help)' ;;
    *) fail "$step is no step: build, run, log or delete (see --help)" ;;
esac
plain IMAGE TYPE NAME NAMESPACE SERVICE_ACCOUNT
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "NAME=$NAME must be of small letters, digits and -, a letter first"
arguments=("${words[@]:1}")
case $step in
    run) need_config ${arguments[@]+"${arguments[@]}"} ;;
    *) need_nothing "$step" ${arguments[@]+"${arguments[@]}"} ;;
esac
case $step in
    build)
        run docker build --platform=linux/amd64 --file="$repository/launch/Dockerfile" --tag="$IMAGE" "$repository"
        run docker push "$IMAGE"
        ;;
    run) run_jobset "${arguments[@]}" ;;
    log) follow ;;
    delete) run kubectl delete jobset "$NAME" "$namespace" ;;
esac
