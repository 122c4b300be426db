"""Follows the log of a running job, and takes the build's result out of it."""

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RESULT_MARK = "CARTRIDGES-RESULT "
"""Begins the line of a job's log that holds the build's JSON."""
POLL_SECONDS = 1.0
RECONNECTS = 5
"""How often a lost log connection is opened again while the job still runs."""


class JobLog:
    """Prints a job's log line by line to stderr, and keeps the marked result out of it."""

    def __init__(self):
        self.result: dict[str, Any] | None = None
        self.characters = 0
        self._line = ""

    def feed(self, text: str) -> None:
        self.characters += len(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)

    def close(self) -> None:
        if self._line:
            self._take(self._line)
            self._line = ""

    def _take(self, line: str) -> None:
        if line.startswith(RESULT_MARK):
            self.result = json.loads(line.removeprefix(RESULT_MARK))
        else:
            print(line, file=sys.stderr)


def follow(client: "JobSubmissionClient", job_id: str) -> dict[str, Any] | None:
    log = JobLog()
    try:
        _follow_to_the_end(client, job_id, log)
    except KeyboardInterrupt:
        print(f"the job goes on; `ray job stop {job_id} --address {client.get_address()}` ends it",
              file=sys.stderr)
        raise
    log.close()
    return log.result


def _follow_to_the_end(client: "JobSubmissionClient", job_id: str, log: JobLog) -> None:
    import aiohttp
    import requests

    lost = 0
    while True:
        try:
            asyncio.run(_tail(client, job_id, log))
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, aiohttp.ClientError, requests.ConnectionError):
            lost += 1
            if lost > RECONNECTS:
                raise
        time.sleep(POLL_SECONDS)


async def _tail(client: "JobSubmissionClient", job_id: str, log: JobLog) -> None:
    """Feed what `log` has not seen; the server sends every log from its beginning."""
    seen = log.characters
    async for text in client.tail_job_logs(job_id):
        log.feed(text[seen:])
        seen = max(0, seen - len(text))
