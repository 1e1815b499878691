"""Where a run's time went: every second is charged to one kind, over all processes that the run took."""

import time
from collections.abc import Callable, Mapping

KINDS = {
    "starting": "starting",  # until the first step: text, tokenizer, building the model
    "compiling": "compiling",  # the first step of each process, compilation included
    "training": "training",
    "waiting": "waiting for data",  # rows that were not ready when the loop asked for them
    "evaluating": "evaluating",
    "saving": "saving",  # while training stood still; most of a save happens beside it
    "lost": "lost to restarts",  # steps trained again after an interruption, and starting anew
}


class Account:
    """Seconds by kind; `charge` books the time since the last call."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._since = clock, clock()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def charge(self, kind: str) -> None:
        """Books the time since the last call, or the start."""
        now = self._clock()
        self.seconds[kind] += now - self._since
        self._since = now

    def resume(self, earlier: Mapping[str, float], trained: float) -> None:
        """Goes on from the account of a checkpoint; `trained` is how far an interrupted process had got beyond it.

        What this process has spent so far, and what the other one trained in vain, is lost.
        """
        self.charge("lost")
        repeated = max(0.0, trained - earlier.get("training", 0.0) - earlier.get("waiting", 0.0))
        spent = sum(self.seconds.values())
        self.seconds = {kind: float(earlier.get(kind, 0.0)) for kind in KINDS}
        self.seconds["lost"] += spent + repeated

    @property
    def trained(self) -> float:
        """Seconds of the training loop that count for its speed."""
        return self.seconds["training"] + self.seconds["waiting"]
