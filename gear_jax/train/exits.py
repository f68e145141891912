"""How a run ends: exit codes that a launcher acts on (reliability.md 3)."""

DONE = 0
NO_CHECKPOINT = 3
DATA = 4
NOT_FINITE = 5
SAVE = 6
COLLAPSED = 7
PREEMPTED = 42  # saved: launch again
INTERNAL = 70


class StopRunError(Exception):
    """Ends a run with one sentence and an exit code."""

    def __init__(self, code: int, sentence: str):
        """Keep both."""
        super().__init__(sentence)
        self.code = code
