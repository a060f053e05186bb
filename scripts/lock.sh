#!/usr/bin/env bash
# Writes requirements/platform.txt and tests.txt from platform.in and tests.in: pinned versions of all that
# the lists before them do not hold already, and that fit them.
set -euo pipefail
cd "$(dirname "$0")/../requirements"

names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$@" | tr '[:upper:]_' '[:lower:]-' | sort; }

lock() {
  local list="$1" before=("${@:2}") constraints=() file resolved
  for file in "${before[@]}"; do constraints+=(--constraints "${file}"); done
  resolved="$(../.venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
    "${constraints[@]}" "${list}.in")"
  comm -23 <(names <(echo "${resolved}")) <(names "${before[@]}") |
    while read -r name; do
      grep -E "^${name}(\[[a-z,]*\])?==" <<<"${resolved}"
    done >"${list}.txt"
  echo "lock: $(wc -l <"${list}.txt") packages in requirements/${list}.txt"
}

lock platform engine-cpu.txt
lock tests engine-cpu.txt platform.txt
