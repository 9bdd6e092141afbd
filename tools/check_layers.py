#!/usr/bin/env python3
"""Checks the house rules that a compiler does not: layers, file sizes, one place for things.

Run from anywhere; prints what is wrong, one line each, and exits 1 if anything is.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A folder includes only what stands at or below it. Public headers follow the same order.
LAYERS = {"base": 0, "comm": 1, "device": 1, "ep": 2, "plan": 2, "reference": 3,
          "tools": 4, "python": 4}
PUBLIC = {
    "base": "allocator deadline dtype error host_device stream tensor version".split(),
    "comm": "bootstrap communicator connection fifo memory memory_channel memory_channel_device port_channel port_channel_device topology".split(),
    "ep": "dispatch_layout expertwire handle high_throughput low_latency shape status tuning".split(),
}
HEADER_LAYER = {name: layer for layer, names in PUBLIC.items() for name in names}
MOST_LINES = 600
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.M)
# Where addresses in memory of peers are made; the last tells kernels their peers.
PEER_ADDRESSES = {"src/ep/cuda/kernel/peer.cuh", "src/ep/cpu/peer.hpp",
                  "src/ep/cuda/runtime/runtime.cpp"}
# Rooms of ep, and those that each may enter.
ROOMS = {"protocol": {"protocol"},
         "front": {"protocol", "front"},
         "cpu": {"protocol", "front", "cpu"},
         "cuda": {"protocol", "front", "cuda"}}
# What every mode has in every backend.
STEMS_OF_MODE = {"combine", "dispatch", "engine"}
TRANSPORT_FILES = {"memory.cpp", "memory.hpp", "transport.cpp"}


def layer_of_file(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] == "include":
        return HEADER_LAYER.get(path.stem)
    if parts[0] == "src":
        return parts[1] if len(parts) > 2 else None
    return "tools" if parts[0] == "tools" else None


def layer_of_include(text, includer):
    parts = text.split("/")
    if parts[0] == "expertwire":
        return HEADER_LAYER.get(pathlib.Path(text).stem, "unlisted")
    if parts[0] in LAYERS:
        return parts[0]
    return layer_of_file(includer)  # a neighbour


def problems():
    sources = [p for folder in ("include", "src", "tools", "tests", "examples", "python")
               for p in (ROOT / folder).rglob("*")
               if p.suffix in {".hpp", ".cpp", ".cu", ".cuh", ".py"}]
    for path in sorted(sources):
        name = path.relative_to(ROOT)
        text = path.read_text()
        lines = text.count("\n")
        if lines > MOST_LINES:
            yield f"{name}: {lines} lines; a file has at most {MOST_LINES}"
        if path.suffix in {".hpp", ".cuh"} and "#pragma once" not in text:
            yield f"{name}: no #pragma once"
        if path.suffix == ".py":
            continue
        if re.search(r"\bgetenv\b|\bsetenv\b", text) and str(name) not in {
                "src/base/env.cpp", "src/base/env.hpp", "tests/unit/env_test.cpp"}:
            yield f"{name}: only src/base/env.cpp reads the environment"
        if re.search(r"\basm\b", text) and name.parts[:2] != ("src", "device") and \
                str(name) != "src/comm/wait.cpp":
            yield f"{name}: assembly belongs in src/device/"
        if name.parts[:2] == ("src", "ep") and re.search(r"[.>]peers\[|region_->peer\(", text) and \
                str(name) not in PEER_ADDRESSES:
            yield f"{name}: addresses in memory of peers are made in {', '.join(sorted(PEER_ADDRESSES))}"
        if name.parts[:2] == ("src", "ep") and name.parts[2] in ROOMS:
            rooms = {i.split("/")[1] for i in INCLUDE.findall(text) if i.startswith("ep/")}
            for room in sorted(rooms - ROOMS[name.parts[2]]):
                yield f"{name}: includes files of ep/{room}, where it must not look"
            if name.parts[2] == "protocol" and re.search(r'#include "(comm/|cuda)', text):
                yield f"{name}: the protocol includes nothing of comm or CUDA"
        if name.parts[0] == "src" and name.parts[1] != "reference" and re.search(r"throw std::|\babort\(\)|\bexit\(", text):
            yield f"{name}: errors of the library are expertwire::Error"
        if name.parts[:2] == ("src", "reference") and re.search(r'#include "ep/', text):
            yield f"{name}: the reference includes nothing of src/ep"
        mine = layer_of_file(path)
        if mine is None and name.parts[0] in {"include", "src"}:
            yield f"{name}: not listed in any layer of {pathlib.Path(__file__).name}"
            continue
        if mine is None:
            continue
        for text_of_include in INCLUDE.findall(text):
            theirs = layer_of_include(text_of_include, path)
            if theirs == "unlisted":
                yield f"{name}: includes {text_of_include}, which is in no layer"
            elif theirs is not None and LAYERS[theirs] > LAYERS[mine]:
                yield f"{name} ({mine}) includes {text_of_include} ({theirs}), a layer above"

    for folder in sorted((ROOT / "src/comm/transport").iterdir()):
        if folder.is_dir():
            files = {p.name for p in folder.iterdir()}
            if not TRANSPORT_FILES <= files:
                yield (f"{folder.relative_to(ROOT)}: has {sorted(files)}; every transport has "
                       f"{sorted(TRANSPORT_FILES)}")
    for backend in ("cpu", "cuda"):
        for mode in ("high_throughput", "low_latency"):
            stems = {p.stem for p in (ROOT / "src/ep" / backend / mode).iterdir()}
            for stem in sorted(STEMS_OF_MODE - stems):
                yield f"src/ep/{backend}/{mode}: has no {stem}; every mode of every backend has"


def main():
    found = list(problems())
    print("\n".join(found) if found else "layers: all rules hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
