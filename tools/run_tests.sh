#!/usr/bin/env bash
# Builds and tests the release build, then the two sanitizer builds, then the Python package, and
# ends with one line that adds them up: "N passed, N failed, N skipped". Fails if anything fails, a build included.
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

run_python() {
  echo "== python =="
  if ! tools/python_env.sh; then
    echo "building the Python package failed"
    failed=$((failed + 1))
    return
  fi
  local log said
  log=$(mktemp)
  build/venv/bin/python -m pytest -q tests/python | tee "$log"
  said=$(tail -n 1 "$log")
  rm -f "$log"
  if ! grep -qE '[0-9]+ (passed|failed|error)' <<<"$said"; then
    echo "pytest gave no result"
    failed=$((failed + 1))
    return
  fi
  count() { sed -nE "s/.*\b([0-9]+) $1.*/\1/p" <<<"$said"; }
  passed=$((passed + $(count passed) + 0))
  failed=$((failed + $(count failed) + $(count error) + 0))
  skipped=$((skipped + $(count skipped) + 0))
}

parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(release asan tsan python)
for part in "${parts[@]}"; do
  if [ "$part" = python ]; then run_python; else run_preset "$part"; fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
