#!/usr/bin/env bash
# lint.sh format   every source file looks as .clang-format says (tested)
# lint.sh fix      makes it so
# lint.sh tidy     clang-tidy over the library, tools and tests (minutes)
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t sources < <(git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh')
case "${1:-format}" in
  format) clang-format --dry-run --Werror "${sources[@]}" ;;
  fix) clang-format -i "${sources[@]}" ;;
  tidy)
    cmake --preset dev >/dev/null
    git ls-files 'src/*.cpp' 'tools/*.cpp' | xargs -P "$(nproc)" -n 4 clang-tidy --quiet -p build/dev
    ;;
  *) sed -n '2,4p' "$0" && exit 2 ;;
esac
