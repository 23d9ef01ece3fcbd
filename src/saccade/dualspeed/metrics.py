"""What a run logs about its two modes, and the running estimate of its speed-up."""

import time
from collections import defaultdict

import torch
from torch import Tensor
from transformers import TrainerCallback

from saccade.dualspeed.schedule import Mode
from saccade.dualspeed.step import StepOutput

MODES: tuple[Mode, ...] = ("fast", "slow")


class ModeMeter:
    """Sums over micro-batches and step times, read out at each log.

    Values stay tensors until then, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self.window: dict[str, float | Tensor] = defaultdict(float)
        self.step_seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        self.teacher_seconds: list[float] = []
        self.tokens: dict[str, float | Tensor] = defaultdict(float)
        self._window_started = time.perf_counter()
        self._teacher_in_step = 0.0

    def add(self, mode: Mode, output: StepOutput) -> None:
        """Count one micro-batch."""
        window, tokens = self.window, self.tokens
        window[f"loss_{mode}"] += output.cross_entropy
        if output.kl is not None:
            window["kl"] += output.kl
        window["samples"] += output.samples
        window["length_full"] += output.tokens_full
        window["length_in"] += output.tokens_in
        tokens["full"] += output.tokens_full
        tokens["trained"] += output.tokens_in
        if output.tokens_teacher is not None:
            tokens["teacher"] += output.tokens_teacher
        self._teacher_in_step += output.teacher_seconds

    def end_step(self, mode: Mode, seconds: float) -> None:
        """Count one optimizer step."""
        self.window[f"steps_{mode}"] += 1
        self.step_seconds[mode].append(seconds)
        if mode == "slow":
            self.teacher_seconds.append(self._teacher_in_step)
        self._teacher_in_step = 0.0

    def token_speedup(self) -> float | None:
        """The speed-up that the token counts allow: full tokens over those run, a teacher's pass at a third.

        A forward and backward pass over a token costs three times a forward pass over it.
        """
        run = 3 * self.tokens["trained"] + self.tokens["teacher"]
        return None if not run else float(3 * self.tokens["full"] / run)

    def time_speedup(self) -> float | None:
        """The measured speed-up of the steps: a slow step less its teacher against the mean step; None without one.

        The first step of each mode is left out, since it pays for start-up.
        """
        fast, slow = self.step_seconds["fast"][1:], self.step_seconds["slow"][1:]
        if not slow or not (fast or slow):
            return None
        full = _mean(slow) - _mean(self.teacher_seconds[1:])
        return full / _mean(fast + slow)

    def read(self) -> dict[str, float]:
        """The metrics since the last call, per mode where both occurred."""
        window = {name: float(value) for name, value in self.window.items()}
        seconds = time.perf_counter() - self._window_started
        metrics: dict[str, float] = {}
        for mode in MODES:
            steps = window.get(f"steps_{mode}", 0)
            metrics[f"steps_{mode}"] = float(len(self.step_seconds[mode]))
            if steps:
                metrics[f"loss_{mode}"] = window.get(f"loss_{mode}", 0.0) / steps
                metrics[f"step_seconds_{mode}"] = _mean(self.step_seconds[mode][-int(steps) :])
        if window.get("steps_slow") and "kl" in window:
            metrics["kl"] = window["kl"] / window["steps_slow"]
        if window.get("samples"):
            metrics["length_full"] = window["length_full"] / window["samples"]
            metrics["length_in"] = window["length_in"] / window["samples"]
            metrics["tokens_per_second"] = window["length_full"] / seconds
        metrics["num_tokens"] = float(self.tokens["trained"])
        for name, value in (("speedup_tokens", self.token_speedup()), ("speedup", self.time_speedup())):
            if value is not None:
                metrics[name] = value
        self.window.clear()
        self._window_started = time.perf_counter()
        return metrics


class StepClock(TrainerCallback):
    """Times each optimizer step and tells the meter its mode."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        # Kept for `on_step_end`, which comes after the global step has moved on.
        self._mode = self.trainer.mode_of(state.global_step)
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.meter.end_step(self._mode, self._now() - self._started)

    def _now(self) -> float:
        # One wait a step, outside the step itself, so that a step's time is its own.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
