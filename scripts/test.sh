#!/usr/bin/env bash
# Install what tests need, then run format, lint, types and tests. Arguments go to pytest, but for:
#   --all   the slow tests too, and those that need a GPU (skipped where there is none)
#   --gpu   those that need a GPU alone
set -euo pipefail
# shellcheck source=scripts/setup_venv.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh" test
# One thread to a worker. Threads that spin while they wait would cost the other worker its core.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled

cpu="not gpu and not slow" gpu=""
words=()
for word in "$@"; do
    case "$word" in
        --all) cpu="not gpu" gpu="gpu" ;;
        --gpu) cpu="" gpu="gpu" ;;
        *) words+=("$word") ;;
    esac
done

ruff format --check .
ruff check .
mypy

# Status 5 says that no test was chosen: `--all -k resume` need not choose one from each tier.
chosen=5
tier() {
    local status=0
    pytest "$@" "${words[@]+"${words[@]}"}" || status=$?
    [ "$status" -eq 0 ] && chosen=0
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || exit "$status"
}
if [ -n "$cpu" ]; then
    # Files stay whole, for the runs and folders that their tests share. Without a GPU: these tests
    # pin what the CPU computes, and rank tests are about processes.
    CUDA_VISIBLE_DEVICES="" tier -n "${TEST_WORKERS:-2}" --dist loadscope -m "$cpu"
fi
if [ -n "$gpu" ]; then
    tier -m "$gpu" -rs
fi
exit "$chosen"
