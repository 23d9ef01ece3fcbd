"""Float32 master copies of weights that are trained in half precision, as in DeepSpeed's bf16 engine.

bfloat16 has eight bits of precision: at fine-tuning learning rates, a step changes most weights by less than half the
distance to the next value, and is rounded away. The optimizer therefore works on float32 copies, and after each step
the weights get their rounded values. The model keeps its own dtype in every pass, in evaluation and on disk.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from saccade.companions import find_companion, read_companion, save_companion
from saccade.dualspeed.config import DualSpeedConfig
from saccade.errors import SaccadeError

logger = logging.getLogger(__name__)

MASTERS_FILE = "float32_masters.saccade"
"""In checkpoints, next to the optimizer's state."""
HALF = (torch.bfloat16, torch.float16)


def trains_in_half_precision(model: nn.Module) -> bool:
    """Whether any trainable weight of `model` has less than float32 precision."""
    return any(weight.requires_grad and weight.dtype in HALF for weight in model.parameters())


def wants_masters(args: DualSpeedConfig, model: nn.Module, engine: str, mixed_precision: bool = False) -> bool:
    """Whether the trainer has to keep master weights itself.

    Args:
        engine: "ddp" (also for one process), "fsdp" or "deepspeed". The last two keep their own: FSDP with mixed
            precision only, where accelerate shards trainable weights in float32 and gathers them in half precision.
        mixed_precision: whether `bf16` or `fp16` is set.

    Raises:
        SaccadeError: if `float32_masters` requests what the engine cannot do, or disables what it always does.
    """
    given = args.float32_masters
    if engine == "deepspeed" or (engine == "fsdp" and mixed_precision):
        if given is False:
            name = "FSDP with bf16=True" if engine == "fsdp" else "DeepSpeed"
            raise SaccadeError(
                f"float32_masters=False: {name} keeps its own float32 weights in any case: leave the option out"
            )
        return False
    if given is False or not trains_in_half_precision(model):
        return False
    why = None
    if engine == "fsdp":
        why = "FSDP keeps trainable weights in float32 only with bf16=True: set that"
    elif args.fp16:
        why = "with fp16=True trainable weights must be in float32: load them in float32, or use bf16=True"
    if why is None:
        return True
    if given:
        raise SaccadeError(f"float32_masters=True: {why}")
    logger.warning("weights train in half precision without float32 masters, where small steps are lost: %s", why)
    return False


class Float32Masters:
    """Float32 copies of an optimizer's half-precision weights, which the optimizer updates instead.

    The copies replace the weights in the optimizer's parameter groups. Before a step, the gradients move from the
    weights to the copies, so that both are never in memory at once; after it, the weights get the copies' rounded
    values. If something else has changed a weight in between, such as loading, its copy is updated first. Where the
    optimizer has a mode for evaluation, as schedule-free ones do, the weights follow when it is switched.

    Raises:
        SaccadeError: if the optimizer does not cover all trainable half-precision weights, or has already taken steps.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if optimizer.state:
            raise SaccadeError(
                "float32_masters: the optimizer that was given has taken steps already: give a new one, or set "
                "float32_masters=False"
            )
        self.optimizer = optimizer
        names = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for group in optimizer.param_groups:
            group["params"] = [self._master(weight, names) for weight in group["params"]]
        left = [name for weight, name in names.items() if weight.dtype in HALF and name not in self._pairs]
        if left:
            raise SaccadeError(
                f"float32_masters: {type(optimizer).__name__} does not step {len(left)} of the weights in half "
                f"precision, such as {left[0]}: choose another optim, or set float32_masters=False"
            )
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._write_back())
        # Schedule-free optimizers evaluate with an average of the weights, and train on from others.
        self._mode: str | None = None
        for mode in ("train", "eval"):
            if callable(getattr(optimizer, mode, None)):
                setattr(optimizer, mode, partial(self._switch, mode, getattr(optimizer, mode)))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The float32 masters, by the names of the weights in the model."""
        return {name: master.detach() for name, (_, master) in self._pairs.items()}

    def save(self, folder: str | Path) -> None:
        """Write `float32_masters.saccade` into `folder`, whole or not at all."""
        save_companion(folder, MASTERS_FILE, self.weights, {})

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote. Without the file, the masters start from the weights, with a warning."""
        if find_companion(folder, MASTERS_FILE) is None:
            logger.warning("%s has no %s: float32 masters start from the rounded weights", folder, MASTERS_FILE)
            return
        _, saved = read_companion(folder, MASTERS_FILE, "resume_from_checkpoint")
        if {name: tuple(value.shape) for name, value in saved.items()} != {
            name: tuple(value.shape) for name, value in self.weights.items()
        }:
            raise SaccadeError(
                f"resume_from_checkpoint={str(folder)!r}: {MASTERS_FILE} is of other weights than these"
            )
        for name, (_, master) in self._pairs.items():
            master.data.copy_(saved[name])

    def _master(self, weight: nn.Parameter, names: dict[nn.Parameter, str]) -> nn.Parameter:
        if weight not in names or weight.dtype not in HALF:
            return weight
        master = nn.Parameter(weight.detach().float())
        self._pairs[names[weight]] = weight, master
        return master

    @torch.no_grad()
    def _switch(self, mode: str, switch: Callable[[], None]) -> None:
        """Let the optimizer switch its parameters to another mode, and the weights with them."""
        if mode == self._mode:  # in training, it is asked to in every micro-batch
            return
        for weight, master in self._pairs.values():
            _follow(weight, master)
        switch()
        self._write_back()
        self._mode = mode

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for weight, master in self._pairs.values():
            _follow(weight, master)
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        for weight, master in self._pairs.values():
            weight.copy_(master)
            master.grad = None


def _follow(weight: Tensor, master: Tensor) -> None:
    """Update the master of a weight that something else has changed, such as loading."""
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))
