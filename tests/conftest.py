"""Shared by all tests: GPU tests skip where there is no CUDA device; Ctrl-C is a Ctrl-C."""

import os
import signal

# Before torch: small systems on several threads wait more than they compute, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure():
    # A shell's background job starts with SIGINT ignored; the tests of Ctrl-C send one.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
