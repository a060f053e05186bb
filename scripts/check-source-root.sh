#!/usr/bin/env bash
# platform/ holds the sources but is no package: an __init__.py there would shadow the standard library's
# platform module, and pytest itself could no longer start to say so.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -e platform/__init__.py ]]; then
  echo "platform/__init__.py: must not exist, it shadows the standard library's platform; delete it" >&2
  exit 1
fi
