"""Times on the device's own clock; nothing waits for the device until they are read."""

import time
from dataclasses import dataclass

import torch


class Moment:
    """A point in the work of a device: on CUDA an event in its stream, elsewhere the wall-clock time.

    Args:
        device: the device.
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
        """Seconds from `before` to this moment; waits until the device has reached it."""
        if self._event is None:
            return self._time - before._time
        self._event.synchronize()
        return before._event.elapsed_time(self._event) / 1000


@dataclass(frozen=True)
class Span:
    """The time between two moments. Making one costs nothing; `seconds` waits for the device."""

    start: Moment
    end: Moment

    @property
    def seconds(self) -> float:
        """The length of the span."""
        return self.end.seconds_since(self.start)
