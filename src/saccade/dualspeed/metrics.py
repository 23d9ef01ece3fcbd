"""What a run logs about its modes, and a running estimate of the speed-up.

Times are taken on the device's own clock; nothing waits for the device until they are read.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from saccade.dualspeed.modes import ModeConfig

if TYPE_CHECKING:
    from saccade.dualspeed.step import StepOutput

TOKENS = ("full", "trained", "teacher")
SUMS = ("kl", "samples", "samples_cut", "tokens_cut", *TOKENS)


class Span:
    """Time on a device's own clock, from when it is made until `end`: of CUDA events, elsewhere of the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._end = self._now()

    def end(self) -> "Span":
        """End the span now, without waiting for the device."""
        self._end = self._now()
        return self

    @property
    def seconds(self) -> float:
        """The length of the span; waits until the device has reached its end."""
        if self.device.type != "cuda":
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event


class ModeMeter:
    """Sums over micro-batches and step times, read at each log.

    Until then values stay tensors, and times stay device events, so that no step waits for the device.

    Args:
        modes: those of the run.
    """

    def __init__(self, modes: Sequence[ModeConfig]) -> None:
        self.modes = tuple(mode.name for mode in modes)
        self.full = next((mode.name for mode in modes if mode.keeps_all), None)
        """The mode that runs the stock model on all tokens, the baseline for speed-ups; None if there is none."""
        self.taught = tuple(mode.name for mode in modes if mode.teacher is not None)
        self.fits = any(mode.action == "drop" and mode.pruning.fit_length is not None for mode in modes)
        """Whether rows are shortened to fit, which is then logged."""
        self.window: dict[str, float | Tensor] = defaultdict(float)
        self.step_seconds: dict[str, list[float]] = {mode: [] for mode in self.modes}
        self.teacher_seconds: dict[str, list[float]] = {mode: [] for mode in self.modes}
        self.tokens: dict[str, float] = dict.fromkeys(TOKENS, 0.0)
        """Tokens of all ranks until the last log: of the full batches, of the trained passes, of the teacher."""
        self.samples = 0
        """Rows of all ranks until the last log."""
        self.steps: dict[str, int] = dict.fromkeys(self.modes, 0)
        """Optimizer steps so far, including those before a resume."""
        self._window_steps: dict[str, int] = dict.fromkeys(self.modes, 0)
        self._window_started = time.perf_counter()
        self._teacher_in_step: tuple[Span, ...] = ()
        self._steps_to_read: list[tuple[str, Span, tuple[Span, ...]]] = []

    def add(self, mode: str, output: "StepOutput", share: float = 1.0) -> None:
        """Count one micro-batch."""
        window = self.window
        window[f"loss_{mode}"] += output.cross_entropy * share
        if output.kl is not None:
            window["kl"] += output.kl * share
        window["samples"] += output.samples
        window["full"] += output.tokens_full
        window["trained"] += output.tokens_in
        if output.cut is not None:
            window["samples_cut"] += output.cut[0]
            window["tokens_cut"] += output.cut[1]
        if output.tokens_teacher is not None:
            window["teacher"] += output.tokens_teacher
        self._teacher_in_step += output.teacher_passes

    def end_step(self, mode: str, span: Span) -> None:
        """Count one optimizer step."""
        self.steps[mode] += 1
        self._window_steps[mode] += 1
        self._steps_to_read.append((mode, span, self._teacher_in_step))
        self._teacher_in_step = ()

    def token_speedup(self) -> float | None:
        """The speed-up predicted from token counts: full tokens over processed tokens, a teacher's counted as a third.

        A forward and backward pass over a token costs three times as much as a forward pass.
        """
        run = 3 * self.tokens["trained"] + self.tokens["teacher"]
        return 3 * self.tokens["full"] / run if run else None

    def time_speedup(self) -> float | None:
        """The measured speed-up: the time of a step on all tokens, minus its teacher, over that of the mean step.

        The means leave out the first step of each mode, which includes start-up costs. Waiting for batches is not
        counted. None until every mode that occurred has had two steps, and if no mode runs on all tokens.
        """
        counts = {mode: len(seconds) for mode, seconds in self.step_seconds.items() if seconds}
        means = {mode: _mean(self.step_seconds[mode][1:]) for mode in counts}
        if self.full not in counts or None in means.values():
            return None
        full = means[self.full] - _mean(self.teacher_seconds[self.full][1:])
        return full * sum(counts.values()) / sum(counts[mode] * means[mode] for mode in counts)

    def collect(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Add the window to the totals, reset it, and return its sums over all ranks.

        Args:
            gather: sums a float64 `(n,)` tensor over ranks; every rank must then call this at the same time.
        """
        sums = self._sums((*(f"loss_{mode}" for mode in self.modes), *SUMS), gather)
        for name in TOKENS:
            self.tokens[name] += sums[name]
        self.samples += round(sums["samples"])
        self.window.clear()
        for mode, span, teacher in self._steps_to_read:
            self.step_seconds[mode].append(span.seconds)
            self.teacher_seconds[mode].append(sum(one.seconds for one in teacher))
        self._steps_to_read.clear()
        return sums

    def so_far(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """`tokens` and `samples` up to now, those since the last log included; `gather` as for `collect`, and not
        called where there are none, as after training."""
        since = self._sums((*TOKENS, "samples"), gather if self.window else None)
        tokens = {name: self.tokens[name] + since[name] for name in TOKENS}
        return {"tokens": tokens, "samples": self.samples + round(since["samples"])}

    def _sums(self, names: Sequence[str], gather: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """The window's sums over all ranks."""
        device = next((value.device for value in self.window.values() if isinstance(value, Tensor)), "cpu")
        values = torch.stack([torch.as_tensor(self.window.get(name, 0.0), device=device).double() for name in names])
        return dict(zip(names, (values if gather is None else gather(values)).tolist(), strict=True))

    def read(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the metrics of the window, for modes that occurred, and reset it; `gather` as for `collect`."""
        sums, steps = self.collect(gather), self._window_steps
        self._window_steps = dict.fromkeys(self.modes, 0)
        seconds = time.perf_counter() - self._window_started
        metrics: dict[str, float] = {}
        for mode in self.modes:
            metrics[f"steps_{mode}"] = float(self.steps[mode])
            if steps[mode]:
                metrics[f"loss_{mode}"] = sums[f"loss_{mode}"] / steps[mode]
                metrics[f"step_seconds_{mode}"] = _mean(self.step_seconds[mode][-steps[mode] :])
                if mode in self.taught:
                    metrics[f"teacher_seconds_{mode}"] = _mean(self.teacher_seconds[mode][-steps[mode] :])
        taught = sum(steps[mode] for mode in self.taught)
        if taught and sums["kl"]:
            metrics["kl"] = sums["kl"] / taught
        if sums["samples"]:
            metrics["length_full"] = sums["full"] / sums["samples"]
            metrics["length_in"] = sums["trained"] / sums["samples"]
            metrics["tokens_per_second"] = sums["full"] / seconds
        if self.fits:
            metrics["rows_cut"] = sums["samples_cut"]
            metrics["tokens_cut"] = sums["tokens_cut"] / max(1.0, sums["samples_cut"])
        metrics["num_tokens"] = self.tokens["trained"]
        metrics |= {"speedup_tokens": self.token_speedup(), "speedup": self.time_speedup()}
        self._window_started = time.perf_counter()
        return {name: value for name, value in metrics.items() if value is not None}


class StepClock(TrainerCallback):
    """Times each optimizer step and tells the meter its mode."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.meter.steps.update(self.trainer.schedule.count(state.global_step, state.max_steps))

    def on_step_begin(self, args, state, control, **kwargs):
        # Kept for `on_step_end`, which is called after the global step has been incremented.
        self._mode = self.trainer.mode_of(state.global_step)
        self.trainer.micro_batch = 0
        self._span = Span(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.meter.end_step(self._mode, self._span.end())

    def on_train_end(self, args, state, control, **kwargs):
        # Steps after the last log count towards the totals too.
        self.trainer.meter.collect(self.trainer.sum_over_ranks)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
