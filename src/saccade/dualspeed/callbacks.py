"""What can end a run early: a signal to stop, a non-finite loss, a dead data worker."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from saccade.dualspeed.checkpoint import newest_checkpoint
from saccade.errors import SaccadeError, counted
from saccade.files import atomic_path
from saccade.interfaces import changed

WORKER_GRACE_SECONDS = 30


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C once a checkpoint is saved; its text says how to resume."""


class SigtermCheckpoint(TrainerCallback):
    """Saves a checkpoint before a run is stopped.

    On SIGTERM, and on the first Ctrl-C, all ranks finish the current step, save a checkpoint and stop; `stopped` is
    then true. Nothing long is started before the checkpoint is saved or after: an evaluation that is due is
    left to the resumed run.
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.stopped = False
        self._asked: int | None = None
        self._is_listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record SIGTERM and the first Ctrl-C while the block runs, instead of ending the process.

        Does nothing inside another such block. A second Ctrl-C raises `KeyboardInterrupt` at once.
        """
        if self._is_listening:
            yield
            return
        self._asked = None
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        self._is_listening = True
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            self._is_listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Finish writing in the block before a signal takes effect."""
        outermost = not self._is_listening
        with self.listening():
            yield
        if outermost and self._asked is not None:
            signal.raise_signal(self._asked)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Stop on signals after the current step, and report a dead data worker in one line.

        Raises:
            SaccadeError: if a process that prepares batches died.
            Interrupted: after Ctrl-C, once a checkpoint is saved.
        """
        self.stopped = False
        try:
            with self.listening():
                yield
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _is_dead_worker(error):
                raise
            line = " ".join(str(error).split())
            raise SaccadeError(
                f"dataloader_num_workers={self.trainer.args.dataloader_num_workers}: a process that prepares batches "
                f"died after step {self.trainer.state.global_step} ({line}); it may have run out of memory, "
                f"use fewer; {way_on(self.trainer)}"
            ) from error
        if self.stopped and self._asked == signal.SIGINT:
            raise Interrupted(way_on(self.trainer))

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self._asked == signal.SIGINT:
                raise KeyboardInterrupt
            # Not `print`, which is not reentrant: the signal may arrive in the middle of one.
            os.write(2, b"\nsaccade: interrupted: saving after this step; Ctrl-C again stops at once\n")
        self._asked = number

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if train_dataloader is None:
            raise changed("callbacks are not given 'train_dataloader' when training begins")
        surviving(train_dataloader)

    def on_step_end(self, args, state, control, **kwargs):
        # The signal may reach only one rank, or several in different steps, so the ranks have to agree.
        asked = torch.tensor([float(self._asked == number) for number in (signal.SIGTERM, signal.SIGINT)])
        if self.trainer.accelerator.num_processes > 1:
            asked = self.trainer.sum_over_ranks(asked)
        terminated, interrupted = (float(count) > 0 for count in asked)
        if terminated or interrupted:
            self._asked = signal.SIGINT if interrupted else signal.SIGTERM
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        # Called in mid-epoch too when a run stops, after its checkpoint is saved.
        if self.stopped:
            control.should_save = control.should_evaluate = False


class NonFiniteGuard(TrainerCallback):
    """Ends a run whose loss or gradient norm is not finite before the next checkpoint, and saves the batch."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._micro_batches: list[tuple[Tensor, Mapping[str, Any]]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._micro_batches.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self._micro_batches.clear()

    def see(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Keep a micro-batch until its step is over, without waiting for the device."""
        self._micro_batches.append((loss.detach(), inputs))

    @contextmanager
    def computing(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Name the batch if non-finite inputs make the computation fail before there is a loss.

        Raises:
            SaccadeError: if the block raises and one of `inputs` is not finite.
        """
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            bad = None if isinstance(error, SaccadeError) else self._not_finite(inputs)
            if bad is None:
                raise
            raise SaccadeError(self._complaint(f"{bad} not finite", inputs)) from error

    def _not_finite(self, inputs: Mapping[str, Any]) -> str | None:
        """Which input of a batch, or its visual features, contain a non-finite value; None if all are finite."""
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                return f"{name} is"
        trainer = self.trainer
        # A single rank must not run a model whose weights are sharded over the ranks.
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not trainer.family.has_images(inputs):
            return None
        with torch.no_grad(), trainer.accelerator.autocast():
            features = trainer.family.encode(inputs).context.features
        return None if features.isfinite().all() else "the visual features are"

    def check(self, grad_norm: Tensor | float | None) -> None:
        """Check the losses and the gradient norm of a step, before its optimizer step where the engine allows it."""
        losses = [float(loss) for loss, _ in self._micro_batches]
        bad = [number for number, loss in enumerate(losses) if not _is_finite(loss)]
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        norm = None if norm is None else float(norm)
        # With float16 loss scaling, gradients may overflow, and such steps are skipped anyway.
        if not bad and (_is_finite(norm) or self.trainer.args.fp16):
            return
        if not bad:
            raise SaccadeError(
                f"the gradient norm is {norm} in step {self.trainer.state.global_step} with finite losses on rank "
                f"{self.trainer.args.process_index}: look at the other ranks' messages, lower learning_rate or train "
                f"in float32; {way_on(self.trainer)}"
            )
        number = bad[0]
        raise SaccadeError(self._complaint(f"the loss is {losses[number]}", self._micro_batches[number][1], number))

    def _complaint(self, what: str, inputs: Mapping[str, Any], number: int | None = None) -> str:
        """One line about a batch, which is saved to disk; by default the one after those seen so far."""
        step, rank = self.trainer.state.global_step, self.trainer.args.process_index
        number = len(self._micro_batches) if number is None else number
        texts = self.trainer._tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        shown = ", ".join(repr(" ".join(text.split())[:60]) for text in texts[:3])
        path = Path(self.trainer.args.output_dir) / f"bad-batch-step-{step}-rank-{rank}.pt"
        batch = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        kept = ""
        # An additional disk error must not hide what happened.
        with suppress(OSError, RuntimeError):
            with atomic_path(path) as partial:
                torch.save(batch, partial)
            kept = f"the batch is in {path}; "
        return (
            f"{what} in step {step}, micro-batch {number} of rank {rank}: {counted(len(texts), 'sample')}, {shown}"
            f"{', ...' if len(texts) > 3 else ''}; {kept}look at these samples, lower learning_rate or train in "
            f"float32; {way_on(self.trainer)}"
        )


def way_on(trainer) -> str:
    """How to resume a run that ended early."""
    newest = newest_checkpoint(trainer.args.output_dir)
    return "no checkpoint was saved yet" if newest is None else f"{newest} is whole, resume from it"


@dataclass
class WorkerStart:
    """Lets a data worker survive a signal to the whole process group, so that the step can be finished."""

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        # Only for a while: a main process may be waiting for the worker to end.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_SECONDS))
        # Ctrl-C in a terminal reaches every process of the group.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def surviving(given: Any) -> Any:
    """The data loader `given`, whose workers survive a signal to the whole process group."""
    # Accelerate's loaders iterate over the loader that they wrap.
    loader = getattr(given, "base_dataloader", given)
    if getattr(loader, "num_workers", 0) and not isinstance(loader.worker_init_fn, WorkerStart):
        loader.worker_init_fn = WorkerStart(loader.worker_init_fn)
    return given


def _is_dead_worker(error: Exception) -> bool:
    """Whether an error means that a data worker died: torch's own error, or a broken pipe while reading a batch."""
    if isinstance(error, RuntimeError):
        # "Caught RuntimeError in DataLoader worker process 0" is an error raised in a worker that is still alive.
        return "DataLoader worker (pid" in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "dataloader.py" for frame in frames)


def _is_finite(value: float | None) -> bool:
    return value is None or value - value == 0
