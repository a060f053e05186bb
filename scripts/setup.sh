#!/usr/bin/env bash
# Creates .venv and installs everything that this checkout runs and tests with. The first time takes a few
# minutes; after that it returns at once unless a requirement changed. ENGINE=cpu or gpu; by default gpu
# where an NVIDIA driver answers. `scripts/setup.sh tests` adds what only tests use.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly uv_version="0.9.30"
readonly venv=".venv"
readonly python="${venv}/bin/python"

fail() {
  echo "setup: $1" >&2
  echo "setup: to go on: $2" >&2
  exit 1
}

engine="${ENGINE:-}"
if [[ -z "${engine}" ]]; then
  engine=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then engine=gpu; fi
fi
[[ "${engine}" == cpu || "${engine}" == gpu ]] ||
  fail "ENGINE=${engine}: unknown" "write ENGINE=cpu or ENGINE=gpu"

wanted="$(cat requirements/*.txt pyproject.toml "$0" | sha256sum | cut -d' ' -f1)-${engine}"
stamp="${venv}/.expertmesh-setup"
tests_stamp="${venv}/.expertmesh-tests"
is_done() { [[ -f "$1" && "$(cat "$1")" == "${wanted}" ]]; }

# uv does not read pip's settings: pass on where pip was told to look for wheels.
links=()
for place in ${PIP_FIND_LINKS:-}; do links+=(--find-links "${place}"); done
install() {
  VIRTUAL_ENV="${PWD}/${venv}" "${venv}/bin/uv" pip install --quiet "${links[@]}" "$@"
}

if [[ "${1:-}" == tests ]]; then
  is_done "${stamp}" || "$0"
  is_done "${tests_stamp}" && exit 0
  echo "setup: installing what only tests use"
  install --no-deps -r requirements/tests.txt ||
    fail "requirements/tests.txt could not be installed" "check the connection, then run this again"
  echo "${wanted}" >"${tests_stamp}"
  exit 0
fi
is_done "${stamp}" && exit 0

started="$(date +%s)"
step() { echo "setup: [$(($(date +%s) - started)) s] $1"; }

base=""
for candidate in "${PYTHON:-}" python3.11 python3; do
  if [[ -n "${candidate}" ]] && command -v "${candidate}" >/dev/null &&
    "${candidate}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    base="${candidate}"
    break
  fi
done
[[ -n "${base}" ]] || fail "no Python 3.11 was found" \
  "install it (Debian: apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11"
[[ "$(uname -s)" == Linux ]] || fail "this is $(uname -s)" "use Linux; the engine's packages exist for it only"

step "creating ${venv} with $("${base}" --version)"
"${base}" -m venv "${venv}" ||
  fail "python -m venv failed" "install Python's venv module (Debian: apt-get install python3.11-venv)"
"${venv}/bin/pip" install --quiet --disable-pip-version-check "uv==${uv_version}" ||
  fail "uv ${uv_version} could not be installed" "check that pip reaches its package index"

if [[ "${engine}" == cpu ]]; then
  step "installing torch (CPU build)"
  # A local wheel if there is one, else PyTorch's own index of CPU builds.
  install --no-deps --no-index -r requirements/torch-cpu.txt 2>/dev/null ||
    install --no-deps --torch-backend cpu -r requirements/torch-cpu.txt ||
    fail "torch could not be installed" "check the connection, and that 2 GB of disk are free (df -h .)"
  step "installing the engine (Ray and vLLM for CPU)"
  install --no-deps -r requirements/engine-cpu.txt ||
    fail "the engine could not be installed" "check the connection, and that 3 GB of disk are free (df -h .)"
  step "installing the platform, its tests and linters"
  install --no-deps -r requirements/platform.txt ||
    fail "requirements/platform.txt could not be installed" "check the connection, then run this again"
  install --no-deps --no-build-isolation --editable . ||
    fail "expertmesh itself could not be installed" "read the message above; is pyproject.toml intact?"
else
  step "installing the GPU engine (Ray and vLLM for CUDA), the platform, its tests and linters"
  install --editable '.[gpu,gateway,controller,dev]' ||
    fail "the GPU extra could not be installed" \
      "check the connection and that 15 GB of disk are free (df -h .), or use ENGINE=cpu"
fi
# Engines start in several processes at once, which would each compile the same modules.
step "compiling"
"${python}" -m compileall -q -j 0 "${venv}/lib" >/dev/null 2>&1 || true
if [[ "${engine}" == cpu ]]; then
  # vLLM inspects a model class in a process of its own the first time, and keeps what it found.
  "${python}" -c 'from vllm import EngineArgs
EngineArgs(model="models/tiny-qwen3-moe", kv_cache_memory_bytes=1 << 26).create_engine_config()' \
    >/dev/null 2>&1 || true
fi
echo "${wanted}" >"${stamp}"
step "done, $(du -sm "${venv}" | cut -f1) MiB in ${venv}"
