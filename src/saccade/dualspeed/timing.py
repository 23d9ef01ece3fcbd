"""Times on the device's own clock, which nothing waits for until they are read."""

import time
from dataclasses import dataclass

import torch


class Moment:
    """A moment in the work of a device: on CUDA an event in its stream, elsewhere the time.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._event = torch.cuda.Event(enable_timing=True)
                self._event.record()
        else:
            self._time = time.perf_counter()

    def seconds_since(self, before: "Moment") -> float:
        """Seconds from `before` to this moment; waits for the device to have got here."""
        if self._event is None:
            return self._time - before._time
        self._event.synchronize()
        return before._event.elapsed_time(self._event) / 1000


@dataclass(frozen=True)
class Span:
    """From one moment to another. Making one costs nothing; `seconds` waits for the device."""

    start: Moment
    end: Moment

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end.seconds_since(self.start)
