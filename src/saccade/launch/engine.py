"""Whether the processes run under the engine that was asked for."""

import os
from typing import Any

from saccade.errors import SaccadeError


def check_engine(accelerator: Any) -> None:
    """Compare what accelerate set up with what the environment asks for.

    Accelerate falls back without a word: FSDP without a GPU becomes plain data parallelism, and several processes
    without a backend become as many runs of one.

    Args:
        accelerator: the trainer's `Accelerator`.

    Raises:
        SaccadeError: naming both.
    """
    found = accelerator.distributed_type.value
    for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and found != engine:
            raise SaccadeError(
                f"launch: {engine} was asked for and accelerate runs {found}: it shards on GPUs only and not with "
                "use_cpu=true; give --launch ddp, or set use_cpu to false"
            )
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != wanted:
        raise SaccadeError(
            f"launch: {wanted} processes were started and accelerate joined {accelerator.num_processes}: "
            "start them with `saccade train --launch` or torchrun"
        )
