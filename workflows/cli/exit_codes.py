"""Exit codes: one line for a user's mistake and for Ctrl-C; defects keep their traceback."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator

from cartridges.errors import NonFiniteLoss, UserError


class PartialFailure(Exception):
    """Some of what was asked for is done, and the rest is not."""


def exit_code(command: Callable[[], None], resumable: bool) -> int:
    """Run `command`: 0, or 2 for a user's mistake, 130 for Ctrl-C and SIGTERM, 1 where nothing can be written, training
    broke down or only a part was done.

    One line on stderr says why; `resumable`: it tells that the same command goes on.
    """
    try:
        with _terminated_like_interrupted():
            command()
        return 0
    except UserError as error:
        print(f"cartridges: {_one_line(error)}", file=sys.stderr)
        return 2
    except (PartialFailure, NonFiniteLoss) as error:
        print(f"cartridges: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; the same command goes on where it stopped" if resumable else ""
        print(f"cartridges: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        found = _disk_error(error)
        if found is None:
            raise
        again = "; then run the same command again" if resumable else ""
        print(f"cartridges: {_one_line(found)}: free space or give a directory that can be written{again}",
              file=sys.stderr)
        return 1


def _disk_error(error: BaseException) -> OSError | None:
    """Where nothing can be written: `error`, what Ray holds it was raised for, or one of their causes."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        carried = vars(one).get("cause")  # of Ray's own, which is called an OSError too and has no errno
        if isinstance(carried, BaseException):
            waiting.append(carried)
        elif isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return one
        waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]
    return None


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what a stage started is stopped by it."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
