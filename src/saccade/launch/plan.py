"""Turn a preset or an accelerate config into the environment of each process, and check in each what came of it."""

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saccade.errors import SaccadeError, did_you_mean, kind_of, needs_package

FOLDER = Path(__file__).parent
PRESETS = ("ddp", "fsdp2", "zero2", "zero3")
_ENGINES = ("MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED", "NO")


@dataclass(frozen=True)
class LaunchPlan:
    """What to start: `processes` on this machine, with the variables that accelerate sets for each of them."""

    processes: int
    environment: dict[str, str]

    def environment_of(self, rank: int) -> dict[str, str]:
        """The complete environment of one process."""
        return {
            **self.environment,
            **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.processes)),
        }


def make_plan(launch: str, processes: int | None = None) -> LaunchPlan:
    """Read a preset or an accelerate config and check that it can run here.

    Args:
        launch: one of `PRESETS`, or the path of an accelerate config.
        processes: by default what the config says, or one per GPU.

    Raises:
        SaccadeError: on an unknown name, a config that accelerate does not accept, a config for several machines, or
            more processes than GPUs.
    """
    path = FOLDER / f"{launch}.yaml" if launch in PRESETS else Path(launch)
    if not path.is_file():
        hint = did_you_mean(launch, PRESETS, f"use {', '.join(PRESETS)}, or the path of an accelerate config")
        raise SaccadeError(f"launch={launch!r} is unknown: {hint}")
    config = _read(path)
    engine = str(config.get("distributed_type", "NO")).upper()
    if engine not in _ENGINES:
        raise SaccadeError(f"launch={launch!r}: distributed_type={engine!r}, expected one of {', '.join(_ENGINES)}")
    machines = config.get("num_machines") or 1
    if machines != 1:
        raise SaccadeError(
            f"launch={launch!r}: num_machines={machines!r}, and --launch starts processes on one: run "
            f"`accelerate launch --config_file {path} -m saccade.cli.main train RECIPE` on each machine"
        )
    gpus = _gpus()
    if processes is None:
        given = config.get("num_processes")
        processes = given if isinstance(given, int) and given > 0 else gpus
    if processes < 1:
        raise SaccadeError(f"processes={processes}: give --processes, at least 1; no GPU was found to count")
    if gpus and processes > gpus:
        raise SaccadeError(f"processes={processes}: this machine has {gpus} GPUs")
    _check_can_shard(launch, engine, gpus)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = {
        "config_file": str(path),
        "num_processes": processes,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_ip": address["MASTER_ADDR"],
        "main_process_port": port,
    }
    return LaunchPlan(processes, {**_environment(launch, path, flags), **address})


def check_engine(accelerator: Any) -> None:
    """Compare what accelerate has set up with what the environment requests.

    Accelerate falls back silently: FSDP without a GPU becomes plain data parallelism, and several processes without a
    backend become independent runs.

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


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SaccadeError(f"launch={str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise SaccadeError(f"launch={str(path)!r} must be an accelerate config, found {kind_of(config)}")
    return config


def _check_can_shard(launch: str, engine: str, gpus: int) -> None:
    if engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise needs_package(f"launch={launch!r}", "deepspeed")
    on_cpu = engine == "DEEPSPEED" and os.environ.get("DS_ACCELERATOR") == "cpu"
    if engine in ("FSDP", "DEEPSPEED") and not gpus and not on_cpu:
        raise SaccadeError(
            f"launch={launch!r} shards over GPUs and none was found; accelerate would silently run plain data "
            "parallelism: give --launch ddp"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _environment(launch: str, path: Path, flags: dict[str, Any]) -> dict[str, str]:
    """What accelerate's own launcher would set for this config."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    try:
        args = launch_command_parser().parse_args([*words, "saccade"])
        args, defaults, precision_given = _validate_launch_command(args)
        if not args.use_deepspeed:
            return prepare_multi_gpu_env(args)
        fields = list(defaults.deepspeed_config) + (["mixed_precision"] if precision_given else [])
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        if args.deepspeed_config_file is not None:
            beside = path.parent / args.deepspeed_config_file
            args.deepspeed_config_file = str(beside if beside.is_file() else args.deepspeed_config_file)
        return prepare_deepspeed_cmd_env(args)[1]
    except (ValueError, TypeError, KeyError, AttributeError, SystemExit) as error:
        raise SaccadeError(
            f"launch={launch!r} is not a config that accelerate accepts: {' '.join(str(error).split())}"
        ) from error
