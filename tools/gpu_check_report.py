#!/usr/bin/env python3
"""What the steps of tools/gpu_check.sh left in a folder, as gpu_check.json there and as a table.

    gpu_check_report.py FOLDER STAGE...

Exits 1 unless every step ended well, every test passed and no value was wrong.
"""

import json
import pathlib
import re
import statistics
import subprocess
import sys

SAID = {"verify_threads": "verified", "verify_posix_fd": "verified", "verify_ipc": "verified",
        "memcheck": "SUMMARY", "racecheck": "SUMMARY", "doctor": "measured",
        "soak_kill_stream": "named", "soak_kill_graph": "named", "soak_stop_stream": "named",
        "soak_stop_graph": "named"}


def gpu_names():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    except FileNotFoundError:
        return []


def log_of(folder, step):
    return (folder / f"{step}.log").read_text(errors="replace").splitlines()


def tests_of(folder):
    tests, removals = [], {}
    for file in ("tests.json", "faults.json"):
        if not (folder / file).exists():
            continue
        for suite in json.loads((folder / file).read_text())["testsuites"]:
            for test in suite["testsuite"]:
                result = "failed" if test.get("failures") else test["result"].lower()
                tests.append({"name": f"{suite['name']}.{test['name']}", "result": result,
                              "time": test["time"]})
                removals.update({k: int(v) for k, v in test.items() if "_without_" in k})
    return tests, removals


def bench_of(file):
    b = json.loads(file.read_text())
    row = {"sms": b["sms"], "wire_bytes": b["bytes_per_rank"]["wire"], "burst_us": b["burst_us"],
           "dispatch_burst_us": b["dispatch_burst_us"], "moments": b["moments"],
           "wrong": b["wrong"], "checked": b["checked"]}
    if b.get("peer_version"):
        row["peer_version"] = b["peer_version"]
    for name, value in b["times"].items():
        key = name.replace(" ", "_")
        row[key] = round(value["mean_us"], 2)
        row[f"{key}_p50"] = round(value["p50_us"], 2)
        row[f"{key}_p99"] = round(value["p99_us"], 2)
    for name, value in b.get("late", {}).items():
        row[name.replace(" ", "_") + "_p50"] = round(value["p50_us"], 2)
        row[name.replace(" ", "_") + "_over_delay_and_usual"] = round(
            value["over_delay_and_usual"], 4)
    return row


def ab_of(folder):
    """Both commits' p50s by row and moment, and the ratio of their medians."""
    rows = {}
    for file in sorted(folder.glob("ab_*.json")):
        name, old = re.fullmatch(r"ab_(.+)_expertwire(_old)?_\d", file.stem).groups()
        which = "old" if old else "new"
        for moment, value in json.loads(file.read_text())["times"].items():
            rows.setdefault(name, {}).setdefault(moment, {}).setdefault(which, []).append(
                round(value["p50_us"], 2))
    for moments in rows.values():
        for both in moments.values():
            if len(both) == 2:
                both["new_over_old"] = round(
                    statistics.median(both["new"]) / statistics.median(both["old"]), 4)
    return rows


def sweep_of(file):
    return [{**{k: p[k] for k in ("sms", "sender_warps", "ring_bytes")},
             **{k: round(p[k]["p50_us"], 1) for k in ("dispatch", "combine")},
             **{k: round(p[k], 1) for k in ("dispatch_burst_us", "burst_us")}}
            for p in json.loads(file.read_text())["points"]]


def collect(folder, stages):
    steps = {file.stem: int(file.read_text()) for file in sorted(folder.glob("*.rc"))}
    tests, removals = tests_of(folder)
    benches = {file.stem[6:]: bench_of(file) for file in sorted(folder.glob("bench_*.json"))}
    said = {}
    for step, words in SAID.items():
        found = [line for line in log_of(folder, step) if words in line] if step in steps else []
        if found:
            said[step] = found[-1]
    passed = (bool(steps) and all(code == 0 for code in steps.values())
              and all(t["result"] == "completed" for t in tests)
              and all(b["wrong"] == 0 for b in benches.values()))
    return {"commit": (folder / "commit").read_text().strip(), "gpus": gpu_names(),
            "stages": stages, "passed": passed, "steps": steps, "said": said,
            "wrong_values_without": removals, "tests": tests, "benches": benches,
            "old_and_new": ab_of(folder),
            "sweeps": {file.stem[6:]: sweep_of(file) for file in sorted(folder.glob("sweep_*.json"))}}


def print_table(folder, report):
    gpus, tests = report["gpus"], report["tests"]
    print(f"\n{len(gpus)} x {gpus[0] if gpus else 'no GPU'}, commit {report['commit'][:12]}, "
          f"stages: {' '.join(report['stages'])}")
    print(f"{sum(t['result'] == 'completed' for t in tests)} of {len(tests)} tests passed")
    for test in tests:
        if test["result"] != "completed":
            print(f"  {test['result']}: {test['name']}")
    for step, code in report["steps"].items():
        if code != 0:
            print(f"  step {step} ended with {code}:")
            for line in log_of(folder, step)[-5:]:
                print("   ", line[:200])
    for step, line in report["said"].items():
        print(f"{step}: {line}")
    print(f"{'kernel p50, us':<24} {'dispatch':>9} {'combine':>9} {'host pair':>10} "
          f"{'graph pair':>10} {'burst':>8} {'burst':>8}")
    for name, b in report["benches"].items():
        if "late_dispatch_p50" in b:
            print(f"{name:<24} {b['late_dispatch_p50']:>9} {b['late_combine_p50']:>9}  others; over "
                  f"delay and usual {b['late_dispatch_over_delay_and_usual']:.3f} "
                  f"{b['late_combine_over_delay_and_usual']:.3f}")
            continue
        print(f"{name:<24} {b['kernel_dispatch_p50']:>9} {b['kernel_combine_p50']:>9} "
              f"{b['host_pair_p50']:>10} {b.get('graph_pair_p50', '-'):>10} "
              f"{b['dispatch_burst_us']:>8.1f} {b['burst_us']:>8.1f}")
    for name, moments in report["old_and_new"].items():
        ratios = {m: both["new_over_old"] for m, both in moments.items() if "new_over_old" in both}
        print(f"{name:<24} new over old: " + ", ".join(f"{m} {r:.3f}" for m, r in ratios.items()))
    for name, points in report["sweeps"].items():
        if name.startswith("rings_"):
            print(f"{name:<28} " + ", ".join(
                f"{p['sms']} SMs {p['dispatch']} + {p['combine']}" for p in points))
    for step in ("sweep_ll", "tune_ht"):
        if step in report["steps"]:
            for line in log_of(folder, step):
                if "best" in line:
                    print(f"{step}: {line[2:]}")
    print("PASSED" if report["passed"] else "FAILED")


def main():
    folder, stages = pathlib.Path(sys.argv[1]), sys.argv[2:]
    report = collect(folder, stages)
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(folder, report)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
