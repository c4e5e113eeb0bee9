"""Ends a front that listens but does not answer, so that the supervisor starts another one."""

from __future__ import annotations

import threading
import time
from http.client import HTTPConnection, HTTPException

from ade_base.ports import LOOPBACK
from handlers.processes.supervision import Child, Supervisor, tell

CHECK_TIMEOUT_S = 20.0
PAUSE_S = 5.0  # after an answer
PAUSE_AT_START_S = 0.5  # after a refusal: short, so that the first answer is seen soon
# Checks in a row without an answer. A service that is suspended as a whole fails one of them.
MAX_UNANSWERED = 6
MAX_UNANSWERED_AT_START = 30  # before the first answer: a front may listen before its workers start


def end_if_it_hangs(front: Child, port: int, supervisor: Supervisor) -> None:
    """Check a front until the service stops, in a thread, and kill it if it hangs.

    Args:
        front: a child that the supervisor restarts when it ends.
        port: of the metrics. The front always serves them on loopback, and its clients' connections
            do not fill that port's queue.
        supervisor: of the child.
    """
    threading.Thread(
        target=_watch, args=(front, port, supervisor), name="watchdog", daemon=True
    ).start()


def _watch(front: Child, port: int, supervisor: Supervisor) -> None:
    process = None
    while not supervisor.is_closed:
        if front.process is not process:  # it was started again
            process, unanswered, limit = front.process, 0, MAX_UNANSWERED_AT_START
        answers = _answers(port)
        if answers is False:
            unanswered += 1
        elif answers:
            unanswered, limit = 0, MAX_UNANSWERED
            time.sleep(PAUSE_S)
        else:
            unanswered = 0
            time.sleep(PAUSE_AT_START_S)
        if unanswered == limit:
            tell(
                f"{front.name} hangs, it left {limit} checks in a row unanswered for "
                f"{CHECK_TIMEOUT_S:g} s each: killing it"
            )
            process.kill()  # which does nothing if it has ended
            unanswered = 0


def _answers(port: int) -> bool | None:
    """Whether a request is answered in time, whatever the answer; ``None`` if it is refused."""
    connection = HTTPConnection(LOOPBACK[0], port, timeout=CHECK_TIMEOUT_S)
    try:
        connection.request("GET", "/")  # answered 404, without any worker
        connection.getresponse().read()
    except TimeoutError:
        return False
    except (OSError, HTTPException):  # the front is starting or ending
        return None
    finally:
        connection.close()
    return True
