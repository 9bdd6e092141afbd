"""What the tests of the Python package share."""

import os

# Epochs start close to where they wrap, as in the tests of the C++ library.
os.environ.setdefault("EXPERTWIRE_FIRST_EPOCH", "0xFFFFFFF0")
os.environ.setdefault("EXPERTWIRE_TIMEOUT_MS", "20000")

import socket

import pytest


@pytest.fixture
def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
