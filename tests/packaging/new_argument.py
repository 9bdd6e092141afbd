#!/usr/bin/env python3
"""What a new optional argument costs: new_argument.patch adds one, and this counts its edits and
compiles what they change. A request is passed whole from the caller to the role that uses it, so
there are two: the argument, and its use.

    new_argument.py COMPILER
"""
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATCH = pathlib.Path(__file__).with_suffix(".patch")
EDITS = 2


def main():
    text = PATCH.read_text()
    changed = re.findall(r"^\+\+\+ b/(\S+)", text, re.M)
    edits = len(re.findall(r"^@@ ", text, re.M))
    if edits != EDITS:
        sys.exit(f"{PATCH.name} makes {edits} edits; a new optional argument takes {EDITS}")
    with tempfile.TemporaryDirectory() as folder:
        for tree in ("include", "src"):
            shutil.copytree(ROOT / tree, pathlib.Path(folder) / tree)
        subprocess.run(["git", "apply", "-C1", PATCH], cwd=folder, check=True)
        for name in changed:
            if name.endswith(".cpp"):
                subprocess.run([sys.argv[1], "-std=c++20", "-fsyntax-only", "-Iinclude", "-Isrc",
                                "-DFMT_HEADER_ONLY", name], cwd=folder, check=True)
    print(f"{edits} edits, in {', '.join(changed)}")


main()
