#!/usr/bin/env bash
# gpu_check.sh: everything that needs a GPU, in one run. Takes the binaries that tools/pack.sh put into
# .pack/bin (or build/portable). Prints a short table last and writes $OUT/gpu_check.json.
#
#   tools/pack.sh && OUT=/tmp/out tools/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT"

tests=.pack/bin/gpu_tests
[ -x "$tests" ] || tests=build/portable/tests/gpu/gpu_tests
export EXPERTWIRE_FIRST_EPOCH=0xFFFFFFF0

"$tests" --gtest_output="json:$OUT/tests.json" >"$OUT/tests.log" 2>&1
status=$?

# The sanitizer slows kernels down a hundredfold: the protocol test alone is small enough.
sanitizer=absent
if command -v compute-sanitizer >/dev/null; then
  sanitizer=clean
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$tests" \
      --gtest_filter='LaneOnDevice.EveryWord*' >"$OUT/$tool.log" 2>&1
    [ $? -ne 0 ] && sanitizer="$tool failed, see $tool.log" && status=1
  done
fi

python3 - "$OUT" "$status" "$sanitizer" "$(cat .pack/commit 2>/dev/null || git rev-parse HEAD)" <<'PY'
import json, pathlib, subprocess, sys

out, status, sanitizer, commit = pathlib.Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
gpus = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
tests = []
for suite in json.loads((out / "tests.json").read_text())["testsuites"]:
    for test in suite["testsuite"]:
        result = "failed" if test.get("failures") else test["result"].lower()
        tests.append({"name": f"{suite['name']}.{test['name']}", "result": result,
                      "time": test["time"]})
report = {"commit": commit, "gpus": gpus, "sanitizer": sanitizer, "tests": tests,
          "passed": status == 0 and all(t["result"] == "completed" for t in tests)}
(out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
print(f"{len(gpus)} x {gpus[0] if gpus else 'no GPU'}, commit {commit[:12]}")
for test in tests:
    print(f"{test['result']:<10} {test['time']:>8}  {test['name']}")
print(f"compute-sanitizer: {sanitizer}")
print("PASSED" if report["passed"] else "FAILED")
sys.exit(0 if report["passed"] else 1)
PY
