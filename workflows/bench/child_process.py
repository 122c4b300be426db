"""Processes that are asked one thing at a time, by JSON lines, while their memory is watched."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from cartridges.errors import UserError

WATCH_SECONDS = 0.05


class ChildProcess:
    """`python -m module`, given `job`. Use as a context manager: it ends with the block.

    `peak_bytes` is the most resident memory seen while it was answering, since `forget_peak`.
    """

    def __init__(self, module: str, job: dict[str, Any]):
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path})
        self._watched = psutil.Process(self._process.pid)
        self.module, self.peak_bytes = module, 0
        self._send(json.dumps(job))

    def ask(self, request: str) -> dict[str, Any]:
        """Raises `RuntimeError` if the process ended instead of answering (why is on stderr), and the
        `UserError` that it answers with as `mistake`."""
        self._send(request)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        while not select.select([self._process.stdout], [], [], WATCH_SECONDS)[0]:
            self.peak_bytes = max(self.peak_bytes, self._watched.memory_info().rss)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.module} ended with exit code {self._process.wait()}; see above")
        reply = json.loads(line)
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        return reply

    def resident_bytes(self) -> int:
        return self._watched.memory_info().rss

    def forget_peak(self) -> None:
        self.peak_bytes = 0

    def _send(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
