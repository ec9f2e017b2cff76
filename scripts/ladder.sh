#!/usr/bin/env bash
# Train all six rungs on the bundled digits, measure them and write the page:  bash scripts/ladder.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_project
[ $# -gt 0 ] || set -- runs/ladder
cd "$OLDPWD"  # OUT is the caller's
exec diffusers-edu ladder "$@"
