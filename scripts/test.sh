#!/usr/bin/env bash
# Run the tests:  bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project dev
ruff check .
ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
mypy
# A process for each core; the tests of a file stay together, for what they share.
exec python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder "$@"
