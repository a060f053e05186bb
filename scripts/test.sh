#!/usr/bin/env bash
# Runs the tests. `scripts/test.sh fast` leaves out those that start Ray, vLLM or servers.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh tests
if [[ "${1:-all}" == fast ]]; then
  exec .venv/bin/python -m pytest -m "not integration and not slow" "${@:2}"
fi
scripts/install-tools.sh
exec .venv/bin/python -m pytest "${@:2}"
