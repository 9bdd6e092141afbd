"""python -m expertwire.deep_ep install | uninstall | run SCRIPT [ARGUMENTS...]

install makes `import deep_ep` mean expertwire's in this environment, unless another deep_ep is there;
uninstall takes that back; run does it for one script alone."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import runpy
import sys
import sysconfig

_MODULES = ("utils", "buffer")
_MARK = "# Made by: python -m expertwire.deep_ep install\n"
_SHIM = _MARK + """import expertwire.deep_ep.__main__ as _main

_main.take_name()
"""


def take_name() -> None:
    """From now on `deep_ep` and its modules are expertwire's, in this process."""
    package = importlib.import_module("expertwire.deep_ep")
    sys.modules["deep_ep"] = package
    for name in _MODULES:
        sys.modules[f"deep_ep.{name}"] = importlib.import_module(f"expertwire.deep_ep.{name}")


def _shim() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["purelib"]) / "deep_ep.py"


def _is_ours(file: pathlib.Path) -> bool:
    return file.exists() and file.read_text().startswith(_MARK)


def _other() -> str:
    """Where another deep_ep lies, or nothing."""
    spec = importlib.util.find_spec("deep_ep")
    if spec is None or (spec.origin and _is_ours(pathlib.Path(spec.origin))):
        return ""
    return str(spec.origin or spec.submodule_search_locations)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["install"] and len(arguments) == 1:
        if other := _other():
            print(f"another deep_ep is installed ({other}); uninstall it first, or use run",
                  file=sys.stderr)
            return 1
        _shim().write_text(_SHIM)
        print(f"import deep_ep is expertwire's now ({_shim()})")
        return 0
    if arguments[:1] == ["uninstall"] and len(arguments) == 1:
        shim = _shim()
        if not _is_ours(shim):
            print("expertwire's deep_ep is not installed", file=sys.stderr)
            return 1
        shim.unlink()
        return 0
    if arguments[:1] == ["run"] and len(arguments) > 1:
        take_name()
        sys.argv = arguments[1:]
        runpy.run_path(arguments[1], run_name="__main__")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
