"""Worker: one engine in a process of its own, asked over pipes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mdplug.errors import MdplugError
from mdplug.workflows._common import write_atomic


class Worker:
    """One engine in its own process (see bench_peers.py).

    Args:
        job: what its `serve` takes, without "started".
        folder: for its log. patience_s: longest wait for an answer.
        check: called every second of waiting; may raise.
        module: of mdplug.workflows, run as a program.

    Raises:
        MdplugError: from `ask`, if the process has died or does not answer in time.
    """

    def __init__(
        self,
        job: dict[str, Any],
        folder: Path,
        patience_s: float,
        check: Callable[[], None] = lambda: None,
        module: str = "bench_peers",
    ):
        self.what, self._patience, self._check = job["engine"], patience_s, check
        name = f"{job['engine']}-{job['dtype']}"
        self._log = folder / f"{name}.log"
        path = folder / f"{name}.job.json"
        threads = str(job["threads"])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENMM_CPU_THREADS": threads,
        }  # fmt: skip
        write_atomic(path, json.dumps({**job, "started": time.time()}))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"mdplug.workflows.{module}", str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,  # Ctrl-C is for us: a worker that dies of it would read as a failed engine
            )  # fmt: skip
        self._buffer = b""

    def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request (None: only wait for the first word) and wait for the answer."""
        assert self._process.stdin is not None
        if request is not None:
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                self._died()
        return json.loads(self._line())

    def _died(self) -> None:
        self._process.wait()
        said = self._log.read_text(errors="replace").strip().splitlines() or ["no message"]
        raise MdplugError(f"{self.what} stopped: {said[-1].strip()}; see {self._log}")

    def _line(self) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        until = time.monotonic() + self._patience
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(min(1.0, self._patience)):
                    self._check()
                    if time.monotonic() > until:
                        raise MdplugError(f"{self.what} did not answer within {self._patience:g} s; see {self._log}")
                    continue
                more = os.read(stream.fileno(), 65536)
                if not more:
                    self._died()
                self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a request that the dead process never read
                stream.close()
