#!/usr/bin/env bash
# python_env.sh [--no-install]: a virtual environment in build/venv with what the Python tests need
# (torch from the package index with what it needs: 5.4 GB on disk), and expertwire built into
# it for CPUs. What is there already is not fetched again.
set -euo pipefail
[ "${1:-}" = "--help" ] && { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit 0; }
cd "$(dirname "$0")/.."
venv=build/venv

[ -x $venv/bin/python ] || python3 -m venv $venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
$venv/bin/pip install -q 'nanobind>=2.2' 'scikit-build-core>=0.10' numpy ml_dtypes pytest torch
[ "${1:-}" = "--no-install" ] ||
  $venv/bin/pip install -q --no-build-isolation . -C cmake.define.EXPERTWIRE_NVCC=OFF
