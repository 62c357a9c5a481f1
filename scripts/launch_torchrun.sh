#!/usr/bin/env bash
# Start this host's share of a training run; call it on every host with the same words. All words
# go to train.py; what concerns hosts is said by variables:
#
# usage: [VARIABLE=value ...] bash scripts/launch_torchrun.sh --config_path FILE --logdir FOLDER ...
#   NNODES          hosts: a number, or MIN:MAX to go on with fewer when one is lost (default 1)
#   RDZV_HOST       name or address, IPv4 or IPv6, of the host where all meet; needed for several
#   RDZV_PORT       a port that is free there and open to the others (default 29400)
#   RDZV_ID         tells runs apart that meet at one host and port (default fewstep)
#   NPROC_PER_NODE  processes of this host (default: one for each GPU, or 1 without GPUs)
#   MAX_RESTARTS    how often ranks are started again after one fails (default 3; of one host 0)
#   STOP_S          seconds to finish the step and save, after SIGTERM or SIGUSR1 (default 300)
#   NODE_ADDR       this host's address for the others (default: the one that reaches RDZV_HOST)
#   RDZV_CONF       more settings of torchrun's rendezvous, such as last_call_timeout=5
#   PYTHON          the interpreter (default: python of .venv, else of the PATH)
#   DRY_RUN=1       print the command instead of running it
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are kept if set; else both name NODE_ADDR's interface.
# docs/multi_node.md says what to check first, and what each error means.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

whole() { # whole NAME VALUE LEAST MOST: refuse what is no whole number within bounds
    case "$2" in
        '' | *[!0-9]* | ??????????*) fail "$1=$2: must be a whole number from $3 to $4" ;;
    esac
    [ "$((10#$2))" -ge "$3" ] && [ "$((10#$2))" -le "$4" ] ||
        fail "$1=$2: must be a whole number from $3 to $4"
}

case "${1-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    '') fail "no words for train.py: give at least --config_path FILE --logdir FOLDER (see --help)" ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python
    [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
fi
command -v "$python" >/dev/null || fail "PYTHON=$python: no such program"

nnodes=${NNODES:-1}
case "$nnodes" in
    *:*:*) fail "NNODES=$nnodes: must be a number of hosts, or MIN:MAX" ;;
    *:*) least=${nnodes%:*} most=${nnodes#*:} ;;
    *) least=$nnodes most=$nnodes ;;
esac
whole NNODES "$least" 1 100000
whole NNODES "$most" 1 100000
[ "$((10#$least))" -le "$((10#$most))" ] || fail "NNODES=$nnodes: MIN must not exceed MAX"

processes=${NPROC_PER_NODE:-}
if [ -z "$processes" ]; then
    processes=1
    ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q . || processes=gpu
fi
[ "$processes" = gpu ] || whole NPROC_PER_NODE "$processes" 1 1024
restarts=${MAX_RESTARTS:-$([ "$((10#$most))" -gt 1 ] && echo 3 || echo 0)}
whole MAX_RESTARTS "$restarts" 0 100000
stop=${STOP_S:-300}
whole STOP_S "$stop" 1 100000
port=${RDZV_PORT:-29400}
whole RDZV_PORT "$port" 1 65535

words=(
    --nnodes "$nnodes" --nproc_per_node "$processes" --max_restarts "$restarts"
    --shutdown_timeout "$stop" --signals_to_handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
)
if [ "$((10#$most))" -eq 1 ]; then
    words+=(--standalone)
else
    host=${RDZV_HOST:-}
    [ -n "$host" ] || fail "RDZV_HOST is not set: NNODES=$nnodes hosts must know where to meet;" \
        "give the name or address of one of them, the same on all"
    host=${host#[} host=${host%]}
    place=$("$python" "$root/scripts/this_host.py" --rdzv_host "$host" --port "$port" \
        ${NODE_ADDR:+--node_addr "$NODE_ADDR"} \
        ${GLOO_SOCKET_IFNAME:+--interface "$GLOO_SOCKET_IFNAME"}) || exit 2
    read -r is_host address interface <<<"$place"
    case "$host" in
        *:*) endpoint="[$host]:$port" ;;
        *) endpoint="$host:$port" ;;
    esac
    words+=(
        --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "${RDZV_ID:-fewstep}"
        --rdzv_conf "is_host=$is_host${RDZV_CONF:+,$RDZV_CONF}" --local_addr "$address"
    )
    # A store of each start's own. The shared one is announced to the first round of hosts alone: in
    # torch 2.13 a host that comes later waits for it in vain, and takes the others down.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
fi

command=("$python" -m torch.distributed.run "${words[@]}" "$root/train.py" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
