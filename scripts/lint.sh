#!/usr/bin/env bash
# Style, types and layers. `scripts/lint.sh fix` formats and mends what it can first.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
if [[ "${1:-}" == fix ]]; then
  "${bin}/ruff" check --fix --quiet . || true
  "${bin}/ruff" format --quiet .
fi
scripts/check-source-root.sh
"${bin}/ruff" check .
"${bin}/ruff" format --check .
"${bin}/mypy"
"${bin}/lint-imports"
