#!/usr/bin/env bash
# gpu_check.sh: everything that needs GPUs, in stages. Takes the binaries that tools/pack.sh put into
# .pack/bin. Runs on any number of GPUs; with one, ranks are threads that share it and nothing crosses
# a link. Prints a short table last, and writes $OUT/gpu_check.json and, with all that was said,
# $OUT/gpu_check.tar.gz (OUT: build/gpu_check if unset).
#
#   tools/pack.sh && OUT=/tmp/out tools/gpu_check.sh [--quick] [--resume FILE] [STAGE...]
#
#   check   tests, faults, verify, sanitizers (under 8 minutes)
#   bench   what a caller gets who names no option, for every mode and output, then other options (3)
#   late    the same while one rank is late (1)
#   sweep   other numbers of SMs, formulas against a sweep, NCCL in the same runs (4)
#   rings   owned output from 128 to 8192 tokens on many numbers of SMs; beside it the older commit's, if
#           that is packed (3)
#   kill    ranks that are killed or stopped, 100 times each on streams and in replays (6)
#   ab      this commit and an older one in turn, each row three times (4); the older one's command is
#           packed if EXPERTWIRE_PACK_OLD names its commit
#
#   staged  the same through host memory, beside what the links give (1); with one GPU, two processes share it
#           by MPS, and its way to host memory
#
# Without stages, all of them but rings and ab. --resume FILE goes on from the gpu_check.tar.gz of an earlier run of the
# same commit: steps that ended well are not run again. --quick verifies for 10 s in place of 60, and
# kills 10 times.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${OUT:-build/gpu_check}
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
mkdir -p "$results"
seconds=60 rounds=100 resume='' stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) seconds=10 rounds=10 ;;
    --resume) resume=$2; shift ;;
    check | bench | late | sweep | rings | staged | kill | ab) stages+=("$1") ;;
    *) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
  esac
  shift
done
[ ${#stages[@]} -gt 0 ] || stages=(check bench late sweep kill)
[ -x .pack/unpack.sh ] && .pack/unpack.sh
bin=$PWD/.pack/bin
[ -x "$bin/gpu_tests" ] || { echo "gpu_check: no $bin/gpu_tests; run tools/pack.sh first" >&2; exit 2; }
commit=$(cat .pack/commit 2>/dev/null || git rev-parse HEAD)
if [ -n "$resume" ]; then
  tar -C "$OUT" -xzf "$resume"
  [ "$(cat "$OUT/commit")" = "$commit" ] || { echo "gpu_check: $resume is of another commit" >&2; exit 2; }
fi
echo "$commit" >"$OUT/commit"
gpus=$(nvidia-smi -L | wc -l)
# Epochs start close to where they wrap. Every stream gets a queue of its own: thread ranks that
# share a GPU must not wait behind each other.
export EXPERTWIRE_FIRST_EPOCH=0xFFFFFFF0 CUDA_DEVICE_MAX_CONNECTIONS=32
# A module that is loaded when it is first used waits for the whole device, also for what another
# thread rank on it has under way.
export CUDA_MODULE_LOADING=EAGER

step() { # step NAME LIMIT COMMAND...
  local name=$1 limit=$2
  shift 2
  [ "$(cat "$OUT/$name.rc" 2>/dev/null)" = 0 ] && return
  local began=$SECONDS
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo $? >"$OUT/$name.rc"
  echo "$name: $(cat "$OUT/$name.rc") ($((SECONDS - began)) s)"
}

bench() { # bench NAME ARGUMENTS...
  local name=$1
  shift
  step "bench_$name" 60 "$bin/expertwire" bench "$@" --device cuda --trace --json "$OUT/bench_$name.json"
}

stage_check() {
  step doctor 60 "$bin/expertwire" doctor
  step tests 240 "$bin/gpu_tests" --gtest_output="json:$OUT/tests.json"
  step vector_copies 60 env EXPERTWIRE_CUDA_COPIES=vector "$bin/gpu_tests" \
    --gtest_filter='*RoundTrip*:*Images*'
  # What has no pool once more, rows through host memory.
  step staged 120 env EXPERTWIRE_STAGED_PAIRS=all "$bin/gpu_tests" \
    --gtest_filter='LowLatency*:*LowLatencyRoundTrip*:Graph/*:Halves*:*Apart.LowLatency*'
  step faults 150 "$bin/gpu_fault_tests" --gtest_output="json:$OUT/faults.json"
  step verify_threads $((seconds + 40)) "$bin/expertwire" verify --device cuda --seconds "$seconds"
  if [ "$gpus" -gt 1 ]; then # memory shared by each way that the machine grants
    for way in posix_fd ipc; do
      step "verify_$way" 60 env EXPERTWIRE_CUDA_MEMORY=$way \
        "$bin/expertwire" verify --device cuda --processes --seconds 5
    done
  fi
  # Ranks that share a GPU do not always get through under racecheck (docs/design/0003): a GPU a rank.
  local sanitized='LaneOnDevice.EveryWord*:*RoundTrip*one_rank'
  [ "$gpus" -gt 1 ] && sanitized+=':*LowLatency*two_ranks'
  [ "$gpus" -gt 2 ] && sanitized+=':*LowLatency*three_ranks'
  for tool in memcheck racecheck; do
    command -v compute-sanitizer >/dev/null || break
    step "$tool" 90 env EXPERTWIRE_LOG=info compute-sanitizer --tool $tool --error-exitcode 9 \
      "$bin/gpu_tests" --gtest_filter="$sanitized"
  done
}

stage_bench() {
  bench ht_owned ht --output owned --iters 30
  bench ht_pool ht --iters 30
  bench ll ll --iters 200
  bench ll_fp8 ll --fp8 --iters 200
  bench ht_fp8 ht --fp8 --iters 30
  bench ht_owned_fp8 ht --fp8 --output owned --iters 30
  bench ll_combine ll --weights combine --iters 200
  for tokens in 1 8 32 256; do bench "ll_$tokens" ll --tokens $tokens --iters 200; done
  # What the rows above compare with the oracle, these take as right: it takes longer than they do.
  for sms in 24 48 64 96; do
    bench "ht_owned_$sms" ht --sms $sms --output owned --iters 30 --no-verify
  done
  for sms in 24 16 8; do bench "ht_pool_$sms" ht --sms $sms --iters 30 --no-verify; done
  bench ht_fp8_24 ht --sms 24 --fp8 --iters 30 --no-verify
}

stage_late() {
  for late in 1ms 3ms; do
    bench "late_${late}_ht_pool" ht --late $late --iters 30 --no-verify
    bench "late_${late}_ht_owned" ht --late $late --output owned --iters 30 --no-verify
    bench "late_${late}_ht_owned_1024" ht --late $late --output owned --tokens 1024 --iters 30 \
      --no-verify
    bench "late_${late}_ll" ll --late $late --iters 100 --no-verify
  done
}

stage_sweep() {
  step sweep_ht 90 "$bin/expertwire" bench ht --sms 0,64,32,24,16,12,8 --iters 15 \
    --device cuda --json "$OUT/sweep_ht.json"
  step sweep_ll 60 "$bin/expertwire" bench ll --tune --device cuda --json "$OUT/sweep_ll.json"
  step tune_ht 90 "$bin/expertwire" bench ht --tune --sms 24 --iters 10 --no-verify \
    --device cuda --json "$OUT/sweep_tune_ht.json"
  local nccl
  nccl=$(find / -xdev -name libnccl.so.2 -not -path '/proc/*' 2>/dev/null | head -1)
  if [ -n "$nccl" ]; then
    # Multicast must stay off on some machines; the copies compared here do not need it.
    export LD_LIBRARY_PATH=$(dirname "$nccl")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} NCCL_NVLS_ENABLE=0
    bench ht_nccl ht --peer nccl --iters 15 --no-verify
    bench ll_nccl ll --peer nccl --iters 100 --no-verify
  fi
}

ab() { # ab NAME ARGUMENTS...: both commits in turn
  local name=$1 round version
  shift
  for round in 1 2 3; do
    for version in expertwire_old expertwire; do
      step "ab_${name}_${version}_$round" 60 "$bin/$version" bench "$@" --device cuda --no-verify \
        --json "$OUT/ab_${name}_${version}_$round.json"
    done
  done
}

stage_ab() {
  [ -x "$bin/expertwire_old" ] || { echo "gpu_check: no older command; see --help" >&2; return; }
  ab ll ll --iters 200
  ab ll_fp8 ll --fp8 --iters 200
  ab ll_combine ll --weights combine --iters 200
  for tokens in 1 8 32 256; do ab "ll_$tokens" ll --tokens $tokens --iters 200; done
  ab ht_pool ht --iters 20
  ab ht_owned_24 ht --sms 24 --output owned --iters 20
  ab ht_fp8 ht --fp8 --iters 20
}

stage_rings() {
  local tokens version
  for tokens in 128 512 1024 2048 4096 8192; do
    for version in expertwire_old expertwire; do
      [ -x "$bin/$version" ] || continue
      step "rings_${tokens}_$version" 60 "$bin/$version" bench ht --output owned --tokens "$tokens" \
        --sms 0,96,64,48,24,16 --iters 20 --no-verify --device cuda \
        --json "$OUT/sweep_rings_${tokens}_$version.json"
    done
  done
}

stage_staged() {
  local pairs tokens own=build/mps
  if [ "$gpus" -eq 1 ]; then
    command -v nvidia-cuda-mps-control >/dev/null || return
    mkdir -p "$own"
    export CUDA_MPS_PIPE_DIRECTORY=$PWD/$own CUDA_MPS_LOG_DIRECTORY=$PWD/$own
    nvidia-cuda-mps-control -d
  fi
  for pairs in none all; do
    export EXPERTWIRE_STAGED_PAIRS=$pairs
    for tokens in 1 8 128; do
      bench "staged_${pairs}_ll_$tokens" ll --ranks 2 --tokens $tokens --iters 50
    done
    for tokens in 512 4096; do
      bench "staged_${pairs}_ht_$tokens" ht --ranks 2 --output owned --tokens $tokens --iters 10
    done
  done
  unset EXPERTWIRE_STAGED_PAIRS
  [ "$gpus" -gt 1 ] || echo quit | nvidia-cuda-mps-control
}

stage_kill() {
  local how where
  for how in kill stop; do
    for where in stream graph; do
      # Processes beside each other: 32 queues each would be more than a GPU has.
      step "soak_${how}_$where" $((60 + rounds * 2)) env -u CUDA_DEVICE_MAX_CONNECTIONS \
        "$bin/kill_soak" "$rounds" $how $where
    done
  done
}

report() { # report [STAGE...]: what there is so far, as JSON and as a table
  tools/gpu_check_report.py "$OUT" "$@"
  local status=$?
  cp "$OUT/gpu_check.json" "$results/"
  tar -C "$OUT" -czf "$results/gpu_check.tar.gz" .
  return $status
}

done_stages=()
for stage in "${stages[@]}"; do
  [ "$stage" = check ] || [ "$stage" = staged ] || [ "$gpus" -gt 1 ] || continue
  stage_"$stage"
  done_stages+=("$stage")
  report "${done_stages[@]}" >/dev/null # in case that the next is not given the time
done
report "${done_stages[@]}"
