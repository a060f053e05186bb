#!/usr/bin/env bash
# Installs the gateways that benchmarks/gateway.py compares with, and its profiler, into .venv-bench: each in an
# environment of its own, as nothing of them may come near what this repository ships.
# About 1 GB; the first time takes a few minutes. Arguments: which of them (rust, litellm, profiler); default all.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly uv_version="0.9.30"
readonly folder=".venv-bench"
readonly uv=".venv/bin/uv"

fail() {
  echo "install-bench-peers: $1" >&2
  echo "install-bench-peers: to go on: $2" >&2
  exit 1
}

[[ -x .venv/bin/python ]] || fail ".venv: is missing" "run make setup first"
[[ -x "${uv}" ]] || .venv/bin/pip install --quiet --disable-pip-version-check "uv==${uv_version}" ||
  fail "uv ${uv_version} could not be installed" "check that pip reaches its package index"

# uv does not read pip's settings: pass on where pip was told to look for wheels.
links=()
for place in ${PIP_FIND_LINKS:-}; do links+=(--find-links "${place}"); done

# install NAME REQUIREMENT…: an environment `NAME` with exactly these, unless it has them.
install() {
  local name="$1" wanted="${*:2}"
  local venv="${folder}/${name}"
  if [[ -f "${venv}/.installed" && "$(cat "${venv}/.installed")" == "${wanted}" ]]; then return; fi
  echo "install-bench-peers: ${name}: ${wanted}"
  "${uv}" venv --quiet --clear --python .venv/bin/python "${venv}" ||
    fail "${venv}: could not be created" "delete it and run this again"
  "${uv}" pip install --quiet --python "${venv}/bin/python" "${links[@]}" "${@:2}" ||
    fail "${name}: could not be installed" "check the connection and that 1 GB of disk is free (df -h .)"
  echo "${wanted}" >"${venv}/.installed"
}

mkdir -p "${folder}"
chosen=("$@")
[[ $# -gt 0 ]] || chosen=(rust litellm profiler)
for name in "${chosen[@]}"; do
  case "${name}" in
    rust) install rust vllm-router==0.1.17 sglang-router==0.3.2 ;;
    litellm)
      # Its own pins name versions that not every index has.
      printf 'certifi>=2026.7\nlitellm-proxy-extras>=0.4.100\n' >"${folder}/litellm-overrides.txt"
      install litellm --override "${folder}/litellm-overrides.txt" 'litellm[proxy]==1.109.1' prometheus-client
      ;;
    profiler) install profiler py-spy ;;
    *) fail "${name}: unknown" "name rust, litellm or profiler" ;;
  esac
done
