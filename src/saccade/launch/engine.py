"""Check that the processes run under the requested engine."""

import os
from typing import Any

from saccade.errors import SaccadeError


def check_engine(accelerator: Any) -> None:
    """Compare what accelerate has set up with what the environment requests.

    Accelerate falls back silently: FSDP without a GPU becomes plain data parallelism, and several processes without a
    backend become independent runs.

    Args:
        accelerator: the trainer's `Accelerator`.

    Raises:
        SaccadeError: if they differ; the message names both.
    """
    found = accelerator.distributed_type.value
    for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and found != engine:
            raise SaccadeError(
                f"launch: {engine} was requested but accelerate runs {found}: it shards on GPUs only and not with "
                "use_cpu=true; give --launch ddp, or set use_cpu to false"
            )
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != wanted:
        raise SaccadeError(
            f"launch: {wanted} processes were started but accelerate joined {accelerator.num_processes}: "
            "start them with `saccade train --launch` or torchrun"
        )
