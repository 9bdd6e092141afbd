#!/usr/bin/env python3
"""Puts the example into README.md between its marks, so that it is what the tests build and run.

`--check` only tells whether it is the same (a test).
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- examples/moe_layer.cpp -->\n```cpp\n).*?(```\n)", re.S)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    example = (ROOT / "examples/moe_layer.cpp").read_text()
    updated, count = MARK.subn(lambda m: m[1] + example + m[2], text)
    if count != 1:
        sys.exit("README.md has no mark for the example")
    if "--check" in sys.argv[1:]:
        sys.exit(0 if updated == text else "README.md differs from examples/moe_layer.cpp; "
                                           "run tools/update_readme.py")
    readme.write_text(updated)


if __name__ == "__main__":
    main()
