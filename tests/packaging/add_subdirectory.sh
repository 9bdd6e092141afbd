#!/usr/bin/env bash
# Builds a program that has expertwire as a subdirectory: the library alone, no tests, no tools.
set -euo pipefail
source_dir=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/user"
cp "$source_dir/examples/moe_layer.cpp" "$work/user/"
cat >"$work/user/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.22)
project(user LANGUAGES CXX)
add_subdirectory($source_dir expertwire)
add_executable(moe_layer moe_layer.cpp)
target_link_libraries(moe_layer PRIVATE expertwire::expertwire)
CMAKE
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
cmake -S "$work/user" -B "$work/build" -DCMAKE_BUILD_TYPE=Release "${launcher[@]}" >/dev/null
cmake --build "$work/build" --parallel 2
[ ! -e "$work/build/expertwire/tools" ]
"$work/build/moe_layer"
