#!/usr/bin/env bash
# Installs what is missing to build and test expertwire, from the distribution's packages.
# Debian 12 or later, Ubuntu 22.04 or later; as root or with sudo. Does nothing if all is there.
set -euo pipefail

packages=(
  g++ cmake ninja-build ccache git python3 pkg-config      # to build
  python3-dev python3-venv                                 # the Python package
  libcli11-dev libfmt-dev libspdlog-dev nlohmann-json3-dev # libraries of the command and the logs
  libhwloc-dev libssl-dev libucx-dev                       # topology, HMAC, network headers
  libgtest-dev libbenchmark-dev                            # tests
  libopenmpi-dev openmpi-bin                               # bench --peer mpi, and a launcher to test
  iproute2 nftables clang-format clang-tidy                # test hosts, lint
  ucx-utils                                                # bench channel beside ucx_perftest
)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || {
    echo "these packages are missing and neither root nor sudo is at hand: ${missing[*]}" >&2
    exit 1
  }
  as_root=(sudo)
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
