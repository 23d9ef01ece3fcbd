"""Checks before the first step, for what would fail later or silently do something else."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from saccade.dualspeed.config import DualSpeedConfig
from saccade.errors import SaccadeError, did_you_mean, kind_of, needs_package
from saccade.families import Family
from saccade.files import check_writable, reading

BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "paged_", "ademamix", "lion_", "rmsprop_bnb")
OPTIMIZER_PACKAGES = (
    (BITSANDBYTES, "bitsandbytes", "bitsandbytes"),
    (("galore_",), "galore_torch", "galore-torch"),
    (("apollo_",), "apollo_torch", "apollo-torch"),
    (("lomo", "adalomo"), "lomo_optim", "lomo-optim"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("schedule_free_",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
)
"""Prefixes of optimizer names, the module that each needs, and the package that provides it."""


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters whose checkpoints could be neither resumed nor exported: PEFT saves those of another name in a
    subfolder."""
    if isinstance(model, PeftModel):
        others = [name for name in model.active_adapters if name != "default"]
        if others:
            raise SaccadeError(
                f"model trains adapters that are named {others[0]!r}: leave adapter_name out of get_peft_model, or "
                "name them 'default'"
            )


def first_columns(train_dataset: Iterable[Mapping[str, Any]] | None) -> list[str]:
    """The columns of a dataset's first row, which differ from the table's if rows are converted when they are read."""
    if isinstance(train_dataset, Mapping):
        splits, first = ", ".join(map(repr, train_dataset)), next(iter(train_dataset), "train")
        raise SaccadeError(
            f"train_dataset is {kind_of(train_dataset)} with the splits {splits}: give one, such as dataset[{first!r}]"
        )
    first = None if train_dataset is None else next(iter(train_dataset), None)
    if first is None:
        raise SaccadeError("train_dataset is None or has no rows: give a dataset with at least one")
    columns = sorted(first)
    if "conversations" in first and not {"messages", "prompt"} & set(columns):
        raise SaccadeError(
            f"train_dataset has the columns {columns}: 'conversations' are LLaVA's own records; "
            "saccade.data.load_rows reads such a file, see docs/data.md"
        )
    if not {"image", "images"} & set(columns):
        raise SaccadeError(
            f"train_dataset has the columns {columns}, none of them images: DualSpeed needs an "
            "'images' column, empty lists for text-only samples"
        )
    return columns


def check_not_ignored(model: str | nn.Module, peft_config: Any, compute_loss_func: Any) -> None:
    """Refuse arguments that only the stock training step would use."""
    if compute_loss_func is not None:
        raise SaccadeError(
            "compute_loss_func is given: fast and slow steps have their own loss, and would ignore it; leave it "
            "out, or set prune_ratio=0, slow_probability=1 and distill_weight=0 for ordinary training, without "
            "padding_free and slow_micro_batch_size"
        )
    for config in (peft_config, *getattr(model, "peft_config", {}).values()):
        if getattr(config, "is_prompt_learning", False):
            raise SaccadeError(
                f"peft_config is {kind_of(config)}, whose tokens PEFT's own forward puts "
                "before the prompt, which fast and slow steps do not call; use LoRA or another adapter of layers"
            )


def check_metrics(args: DualSpeedConfig, compute_metrics: Any) -> None:
    """Refuse metrics where an evaluation has no logits to compute them from."""
    if compute_metrics is None:
        return
    skips = any(mode.action == "skip" for mode in args.all_modes())
    if skips or args.fit_slow:
        why = "modes that skip" if skips else "fit_slow=True"
        raise SaccadeError(
            f"compute_metrics is given with {why}: an evaluation then computes the loss alone, so leave it out, and "
            "run `saccade eval` on the trained model"
        )


def check_precision(model: nn.Module, args: DualSpeedConfig) -> None:
    """Refuse weights that do not work with mixed precision: many released checkpoints are float16."""
    # TRL converts the unquantized weights of a quantized model to float32.
    quantized = getattr(model, "is_quantized", False)
    if args.bf16 and not quantized and any(weight.dtype == torch.float16 for weight in model.parameters()):
        raise SaccadeError(
            "bf16=True with a model in float16: load it with dtype=torch.bfloat16 or torch.float32 (in a recipe "
            "dtype: bfloat16 or float32), or set bf16=False"
        )


def check_one_gpu(args: DualSpeedConfig) -> None:
    """Refuse a process that sees several GPUs, as TRL does only once the model is loaded: the stock trainer would use
    `DataParallel`, whose copies would all run the first GPU's model."""
    if args.n_gpu > 1:
        raise SaccadeError(
            f"n_gpu={args.n_gpu}: a process trains on one GPU and this one sees {args.n_gpu}; start one for each with "
            "`saccade train RECIPE --launch ddp`, torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0 to "
            "train on one"
        )


def check_at_hand(args: DualSpeedConfig) -> None:
    """Refuse options whose package or file is missing, before a model is loaded."""
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise needs_package("use_liger_kernel=True", "liger-kernel")
    optimizer = str(getattr(args.optim, "value", args.optim))
    for names, module, package in OPTIMIZER_PACKAGES:
        if optimizer.startswith(names) and find_spec(module) is None:
            raise needs_package(f"optim={optimizer!r}", package)
    here = get_available_reporting_integrations()
    for name in args.report_to if isinstance(args.report_to, list) else [args.report_to]:
        if isinstance(name, str) and name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK, "use tensorboard, wandb, trackio or none")
            raise SaccadeError(f"report_to={name!r} is unknown: {hint}")
        if name in INTEGRATION_TO_CALLBACK and name not in (*here, "azure_ml", "flyte"):
            raise needs_package(f"report_to={name!r}", name)
    for field in ("output_dir", "feature_cache"):
        if getattr(args, field) is not None:
            check_writable(getattr(args, field), field, folder=True)
    template = Path(args.chat_template_path or ".")
    # A relative path without a suffix may be a model on the hub.
    if not template.exists() and (template.suffix or template.is_absolute()):
        raise SaccadeError(f"chat_template_path={str(template)!r} does not exist: name a Jinja file")
    if template.is_file():
        read_template(template)


def read_template(path: Path) -> str:
    """The text of a recipe's own chat template.

    Raises:
        SaccadeError: if it is not text in UTF-8.
    """
    with reading(f"chat_template_path={str(path)!r} is not a Jinja file in UTF-8"):
        return path.read_text(encoding="utf-8")


@contextmanager
def as_bad_input() -> Iterator[None]:
    """Turn errors of TRL, transformers and the hub about bad input into one line."""
    try:
        yield
    except SaccadeError:
        raise
    except (ImportError, ValueError, TypeError, OSError) as error:
        # Disk errors have an errno, and are reported as such elsewhere.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SaccadeError(" ".join(str(error).split())) from error


def check_model_trains(model: nn.Module, added: Iterable[nn.Module]) -> None:
    """Refuse a model of which nothing trains but the modules that the trainer has added to it.

    Args:
        added: the mode isolator and the summary head, where there are any.
    """
    own = {weight for module in added for weight in module.parameters()}
    if any(weight.requires_grad and weight not in own for weight in model.parameters()):
        return
    fix = "load it anew, or call model.requires_grad_(True) first"
    if isinstance(model, PeftModel):
        fix = "load its adapters with PeftModel.from_pretrained(model, folder, is_trainable=True)"
    raise SaccadeError(f"model is {kind_of(model)} of which no weight trains: {fix}")


def check_full_batch(args: DualSpeedConfig, rows: int) -> None:
    """Refuse rows that make no full batch where the others are dropped: there would be nothing to train on."""
    batch = args.train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
    if args.dataloader_drop_last and rows < batch:
        raise SaccadeError(
            f"dataloader_drop_last=True drops all {rows} rows, which make no batch of {batch} "
            f"(per_device_train_batch_size={args.per_device_train_batch_size}): set it to False, or give more rows"
        )


def check_language_model_trains(family: Family, args: DualSpeedConfig) -> None:
    """Refuse a language model that is frozen by accident, as after stage one or after adapters were merged."""
    parts = (family.language_model, family.model.get_output_embeddings())
    if not args.freeze_language_model and not any(
        weight.requires_grad for part in parts for weight in part.parameters()
    ):
        raise SaccadeError(
            "freeze_language_model=False, but no weight of the language model trains: after a stage that froze it, or "
            "adapters that were merged, load the model from a folder or call model.requires_grad_(True); else set "
            "freeze_language_model=True"
        )
