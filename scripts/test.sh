#!/usr/bin/env bash
# Install what tests need, then run format, lint, types and tests. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/setup_venv.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh" test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
ruff format --check .
ruff check .
mypy
pytest -m "not gpu" "$@"
