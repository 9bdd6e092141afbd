#!/usr/bin/env bash
# pack.sh: gathers in .pack/ (ignored by git) what a machine without a network needs to run and to
# build expertwire: the sources, self-contained binaries (preset `portable`), and the headers that a
# bare machine lacks. Under 60 MiB. There: .pack/run.sh checks that the binaries work.
#
#   .pack/src/       the sources, as git has them and as they are now
#   .pack/bin.tar.xz expertwire and the tests, those for GPUs too where nvcc was at hand;
#                    .pack/unpack.sh puts them into .pack/bin/
#   .pack/include/   CLI11, fmt, spdlog, nlohmann, GoogleTest (with sources), UCX, OpenSSL headers
#   .pack/lib.tar.xz static GoogleTest and libcrypto
#
# EXPERTWIRE_PACK_OLD names a commit whose command is packed, too, to be measured beside this one's.
# Kernels are packed for Hopper alone; EXPERTWIRE_PACK_ARCHITECTURES names others.
set -euo pipefail
[ "${1:-}" = "--help" ] && { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit 0; }
cd "$(dirname "$0")/.."
most_mib=60

cmake --preset portable -DCMAKE_CUDA_ARCHITECTURES="${EXPERTWIRE_PACK_ARCHITECTURES:-90-real}" >/dev/null
cmake --build --preset portable
rm -rf .pack
mkdir -p .pack/{src,bin,include,lib}

git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t .pack/src
for program in bin/expertwire tests/unit/unit_tests tests/ranks/rank_tests \
  tests/ranks/fault_tests; do
  install -s "build/portable/$program" .pack/bin/
done
for program in gpu_tests gpu_fault_tests kill_soak; do
  [ -x "build/portable/tests/gpu/$program" ] && install -s "build/portable/tests/gpu/$program" .pack/bin/
done
if [ -n "${EXPERTWIRE_PACK_OLD:-}" ]; then
  git worktree add --force --detach build/old "$EXPERTWIRE_PACK_OLD" >/dev/null
  (cd build/old && cmake --preset portable \
    -DCMAKE_CUDA_ARCHITECTURES="${EXPERTWIRE_PACK_ARCHITECTURES:-90-real}" >/dev/null &&
    cmake --build --preset portable --target expertwire_cli)
  install -s build/old/build/portable/bin/expertwire .pack/bin/expertwire_old
  git worktree remove --force build/old
fi
git describe --always --dirty --abbrev=40 --exclude '*' >.pack/commit

for header in CLI fmt spdlog nlohmann gtest gmock ucp ucs uct ucm openssl; do
  for root in /usr/include /usr/include/x86_64-linux-gnu; do
    [ -d "$root/$header" ] && mkdir -p ".pack/include/$header" &&
      cp -rL "$root/$header/." ".pack/include/$header/"
  done
done
for library in libgtest.a libgtest_main.a libcrypto.a; do
  cp "$(g++ -print-file-name=$library)" .pack/lib/
  strip --strip-debug ".pack/lib/$library"
done
tar -C .pack -cJf .pack/lib.tar.xz lib && rm -r .pack/lib

tar -C .pack --sort=name -cf - bin | xz -T2 --lzma2=preset=1,dict=96MiB >.pack/bin.tar.xz
rm -r .pack/bin
cat >.pack/unpack.sh <<'RUN'
#!/usr/bin/env bash
# Puts the binaries into bin/, once.
cd "$(dirname "$0")"
[ -d bin ] || tar -xf bin.tar.xz
RUN
chmod +x .pack/unpack.sh

cat >.pack/run.sh <<'RUN'
#!/usr/bin/env bash
# Runs what was packed: the unit and rank tests, a minute of verify, the demo.
set -euo pipefail
"$(dirname "$0")/unpack.sh"
cd "$(dirname "$0")/bin"
export EXPERTWIRE_FIRST_EPOCH=0xFFFFFFF0
./unit_tests --gtest_brief=1 --gtest_filter=-Env.PageInDocsIsTheCodes
./rank_tests --gtest_brief=1
./fault_tests --gtest_brief=1
./expertwire verify --seconds "${1:-20}"
./expertwire verify --seconds 5 --ranks 4 --processes
./expertwire demo
RUN
chmod +x .pack/run.sh

size=$(du -sm .pack | cut -f1)
echo ".pack: $size MiB"
[ "$size" -le "$most_mib" ] || { echo "over $most_mib MiB" >&2; exit 1; }
