#!/usr/bin/env bash
# Runs the tests. `scripts/test.sh fast` leaves out those that start Ray, vLLM or servers.
set -euo pipefail
cd "$(dirname "$0")/.."

alone="integration or slow"
scripts/setup.sh tests
if [[ "${1:-all}" == fast ]]; then
  exec .venv/bin/python -m pytest -n auto -m "not (${alone})" "${@:2}"
fi
scripts/install-tools.sh

# Two runs: those that start real parts have the machine to themselves, the others share it.
failed=0
run() {
  local code=0
  .venv/bin/python -m pytest "$@" || code=$?
  # 5: of this kind there is none among those asked for.
  [[ "${code}" == 0 || "${code}" == 5 ]] || failed="${code}"
}
run -n auto -m "not (${alone})" "${@:2}"
run -m "${alone}" "${@:2}"
exit "${failed}"
