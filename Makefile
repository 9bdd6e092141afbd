# Two commands on a fresh machine: `make demo` and `make test`. Everything else is CMake's.
.PHONY: demo test build check soak clean

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

demo:
	tools/install_dependencies.sh
	cmake --preset release
	cmake --build --preset release --target expertwire_cli
	./build/release/bin/expertwire demo

# Release, address+undefined and thread sanitizer builds, each with its tests; the Python package.
test:
	tools/install_dependencies.sh
	tools/run_tests.sh

# The release build's tests alone: the quick round while working.
check: build
	ctest --test-dir build/release --output-on-failure -j $(CMAKE_BUILD_PARALLEL_LEVEL)

build:
	tools/install_dependencies.sh
	cmake --preset release
	cmake --build --preset release

# What can happen to peers and networks, thirty times each; as root. The log is committed.
soak: build
	tools/soak.sh

clean:
	rm -rf build
