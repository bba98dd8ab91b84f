"""Signs of life of other ranks, and how an error names the one that is to blame."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

BEAT = 1.0  # seconds between two signs of life
TOO_SILENT = 60.0  # seconds without one, after which a patient wait ends the job
SILENCE = 4.0  # seconds without one, after which a rank counts as dead or stopped


@dataclass
class Sign:
    """The last sign of life of another rank."""

    said: dict[str, Any]
    heard: float  # when it was first seen, by the clock of this rank

    def silence(self) -> float:
        """Return for how many seconds nothing new has come."""
        return time.monotonic() - self.heard


def name_failed(rank: int, sign: Sign) -> str | None:
    """Name a rank that told why it ended, unless that was because of others."""
    words = sign.said["last_words"]
    return f"rank {rank} on {sign.said['host']} ended: {words}" if words else None


def name_silent(rank: int, sign: Sign) -> str | None:
    """Name a rank whose heart stopped, unless it said so."""
    if sign.silence() <= SILENCE - BEAT or sign.said["last_words"] is not None:
        return None
    where = f"in stage {sign.said['stage']!r}" if sign.said["stage"] else "outside any stage"
    host, silence = sign.said["host"], sign.silence()
    return f"rank {rank} on {host} has been silent for {silence:.0f} s, last seen {where}"


def name_late(rank: int, sign: Sign, mine: str | None) -> str | None:
    """Name a rank that does something else than wait where this one waits."""
    said = sign.said
    if said["stage"] is None:
        return f"rank {rank} on {said['host']} is busy outside any stage"
    if said["waits"] and said["stage"] == mine:
        return None
    age = said["age"] + sign.silence()
    return f"rank {rank} on {said['host']} is still in stage {said['stage']!r}, for {age:.0f} s"
