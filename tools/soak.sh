#!/usr/bin/env bash
# Runs what can happen to peers and networks (tests/hosts, Failure) thirty times each, as root, and
# writes docs/results/soak/hosts.log: commit, date, versions, and what every test said. Some ten
# minutes at most. `soak.sh check` looks whether that log is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

log=docs/results/soak/hosts.log
times=10 # every test does its case three times
tests=build/release/tests/hosts/host_tests

check() {
  [ -s "$log" ] || { echo "$log is missing; run tools/soak.sh" && exit 1; }
  grep -qE '^commit [0-9a-f]{7,}' "$log" || { echo "$log names no commit" && exit 1; }
  grep -qE '^date [0-9]{4}-[0-9]{2}-[0-9]{2}' "$log" || { echo "$log names no date" && exit 1; }
  local bad=0 name count
  while read -r name; do
    count=$(grep -cF "OK $name" "$log" || true)
    [ "$count" -ge "$times" ] || { echo "$name: passed $count of $times times" && bad=1; }
  done < <(list)
  ! grep -q '^FAILED' "$log" || { echo "$log has failures" && bad=1; }
  exit "$bad"
}

# Every test of the group but the one that is for machines without UCX.
list() {
  sed -nE 's/^TEST\(Failure, (\w+)\).*/Failure.\1/p' tests/hosts/failure_test.cpp | grep -v WithoutUcx
  for ranks in 2 3; do
    sed -nE "s/^TEST_P\(Failure, (\w+)\).*/Hosts\/Failure.\1\/$ranks/p" tests/hosts/failure_test.cpp
  done
}

[ "${1:-}" != check ] || check
mkdir -p "$(dirname "$log")"
{
  echo "commit $(git rev-parse --short HEAD)"
  echo "date $(date -u +%F)"
  echo "kernel $(uname -r), $(nproc) cores"
  "$tests" --gtest_filter='*Failure.*' --gtest_repeat=$times 2>&1 |
    sed -nE 's/^\[ +OK \] ([^ ,]+).*\(([0-9]+) ms\)/OK \1 \2 ms/p; s/^\[  FAILED  \] ([^ ,]+).*ms\)/FAILED \1/p'
} >"$log"
check
