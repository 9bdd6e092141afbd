#!/usr/bin/env bash
# Builds and tests the release build, then the two sanitizer builds, and ends with one line that
# adds them up: "N passed, N failed, N skipped". Fails if anything fails, a build included.
set -uo pipefail
cd "$(dirname "$0")/.."

jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
passed=0
failed=0
skipped=0

run_preset() {
  local preset=$1 log
  echo "== $preset =="
  if ! cmake --preset "$preset" >/dev/null || ! cmake --build --preset "$preset"; then
    echo "the $preset build failed"
    failed=$((failed + 1))
    return
  fi
  log=$(mktemp)
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$jobs" | tee "$log" |
    grep -vE '^ *Start +[0-9]+:|   Passed  '
  local bad skips total
  total=$(sed -nE 's/.*tests failed out of ([0-9]+).*/\1/p' "$log" | tail -n 1)
  bad=$(sed -nE 's/.*, ([0-9]+) tests? failed out of.*/\1/p' "$log" | tail -n 1)
  skips=$(grep -c '\*\*\*Skipped' "$log")  # GPU tests, where there is none
  rm -f "$log"
  if [ -z "$total" ]; then
    echo "ctest of $preset gave no result"
    failed=$((failed + 1))
    return
  fi
  passed=$((passed + total - bad - skips))
  failed=$((failed + bad))
  skipped=$((skipped + skips))
}

presets=("$@")
[ ${#presets[@]} -eq 0 ] && presets=(release asan tsan)
for preset in "${presets[@]}"; do run_preset "$preset"; done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
