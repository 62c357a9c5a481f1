#!/usr/bin/env bash
#SBATCH --job-name=fewstep
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Train on the hosts of a Slurm job; submit it from the repository's root. All words go to train.py.
# Five minutes before the time limit (SIGUSR1), or when the job is preempted (SIGTERM), the run saves
# after its current step and is queued again; it continues from there. A job that is cancelled, done,
# or that fails is not queued again.
#
# usage: sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/launch_slurm.sh \
#            --config_path FILE --logdir FOLDER ...
# Slurm's own words may differ from those above, but keep --ntasks-per-node=1, and with another
# --signal=B:USR1@SECONDS set STOP_S to less. Variables, all optional: NPROC_PER_NODE, MAX_RESTARTS,
# RDZV_PORT, RDZV_CONF, PYTHON (see scripts/launch_torchrun.sh --help), and
#   RDZV_HOST  where ranks meet (default: the job's first host)
#   STOP_S     seconds to finish the step and save (default 270)
#   REQUEUE    0 = never queue the job again (default 1)
set -uo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

case "${1-}" in
    -h | --help) sed -n '7,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    '') fail "no words for train.py: give at least --config_path FILE --logdir FOLDER (see --help)" ;;
esac
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NNODES SLURM_SUBMIT_DIR; do
    [ -n "${!name-}" ] ||
        fail "$name is not set: submit this with sbatch, or use scripts/launch_torchrun.sh by hand"
done
for program in srun scontrol; do
    command -v "$program" >/dev/null || fail "$program: no such program; is Slurm on the PATH?"
done
# Slurm runs a copy of this file, so its own place says nothing.
launcher=$SLURM_SUBMIT_DIR/scripts/launch_torchrun.sh
[ -f "$launcher" ] || fail "$launcher: no such file; submit from the repository's root"
case "${REQUEUE:-1}" in
    0 | 1) ;;
    *) fail "REQUEUE=$REQUEUE: must be 0 or 1" ;;
esac

if [ -z "${RDZV_HOST-}" ]; then
    RDZV_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    [ -n "$RDZV_HOST" ] || fail "SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST: scontrol names no host"
fi
export RDZV_HOST
export NNODES=$SLURM_NNODES
export RDZV_ID=fewstep-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
# Jobs that share a host meet at ports of their own, below those that systems hand out.
export RDZV_PORT=${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export STOP_S=${STOP_S:-270}
[ -z "${SLURM_GPUS_ON_NODE-}" ] || export NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}

stopped="" step=""
# shellcheck disable=SC2329 # the traps call it
stop() { # stop SIGNAL: have all hosts save after the current step; srun passes the signal on
    [ -z "$stopped" ] || return 0
    stopped=$1
    echo "SIG$1: saving after the current step" >&2
    [ -z "$step" ] || kill -TERM "$step" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# A host whose ranks are done must not take the others' down while they save.
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 bash "$launcher" "$@" &
step=$!
status=0
while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break # a signal ends `wait` early
done

if [ "$status" -eq 0 ]; then
    echo "done" >&2
    exit 0
fi
if [ -z "$stopped" ]; then
    echo "error: the run failed with status $status, and is not queued again; its own words are" \
        "above" >&2
    exit "$status"
fi
if [ "${REQUEUE:-1}" = 0 ] ||
    { [ "$stopped" = TERM ] && scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=CANCELLED'; }
then
    echo "stopped; submit the same job again to continue" >&2
    exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID" ||
    fail "job $SLURM_JOB_ID cannot be queued again; submit the same job again to continue"
echo "stopped, and queued again" >&2
exit "$status"
