#!/usr/bin/env bash
# Writes requirements/platform.txt from platform.in: pinned versions of all that the engine list does not
# hold already, and that fit it.
set -euo pipefail
cd "$(dirname "$0")/.."

resolved="$(.venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
  --constraints requirements/engine-cpu.txt requirements/platform.in)"
names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$1" | tr '[:upper:]_' '[:lower:]-' | sort; }
comm -23 <(names <(echo "${resolved}")) <(names requirements/engine-cpu.txt) |
  while read -r name; do
    grep -E "^${name}(\[[a-z,]*\])?==" <<<"${resolved}"
  done >requirements/platform.txt
echo "lock: $(wc -l <requirements/platform.txt) packages in requirements/platform.txt"
