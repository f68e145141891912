"""Ends a process in which nothing happens any more.

A collective whose partner hangs, or a data worker that never answers, cannot be interrupted from
Python; a thread beside it can say where everything stands, and end the process.
"""

import faulthandler
import os
import sys
import threading
import time

from gear_jax.train import exits

SLOW = 6  # compiling, evaluating and saving may take so many times longer than a step


class Watchdog:
    """Told before everything that may hang; ends the process with `exits.INTERNAL`."""

    def __init__(self, minutes: float):
        """Begin to watch.

        Args:
            minutes: that a step or its data may take.
        """
        self._limit = 60 * minutes
        self._stopped = threading.Event()
        self.at("start", slow=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, what: str, *, slow: bool = False) -> None:
        """Say what begins now.

        Args:
            what: for the message.
            slow: it may take `SLOW` times as long.
        """
        self._doing = what, time.monotonic(), self._limit * (SLOW if slow else 1)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()

    def _watch(self):
        while not self._stopped.wait(min(1.0, self._limit / 4)):
            what, since, limit = self._doing
            if time.monotonic() - since > limit:
                faulthandler.dump_traceback(sys.stderr)
                print(
                    f"error: {what} has taken more than {limit:.0f} s: it hangs where the stacks "
                    "above say; launch again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(exits.INTERNAL)
