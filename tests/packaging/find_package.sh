#!/usr/bin/env bash
# Installs expertwire and builds a program that finds it with find_package.
set -euo pipefail
source_dir=$1
binary_dir=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$binary_dir" --prefix "$work/prefix" >/dev/null
mkdir "$work/user"
cp "$source_dir/examples/moe_layer.cpp" "$work/user/"
cat >"$work/user/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.22)
project(user LANGUAGES CXX)
find_package(expertwire 0.1 REQUIRED)
add_executable(moe_layer moe_layer.cpp)
target_link_libraries(moe_layer PRIVATE expertwire::expertwire)
CMAKE
cmake -S "$work/user" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/build"
"$work/prefix/bin/expertwire" launch -n 2 -- "$work/build/moe_layer"
