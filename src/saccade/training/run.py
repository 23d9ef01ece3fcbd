"""Train a recipe, from the first checks to the saved model."""

import re
import sys
from collections.abc import Collection, Iterable, Sized
from contextlib import ExitStack
from datetime import date
from itertools import islice
from pathlib import Path

from peft import LoraConfig, prepare_model_for_kbit_training
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from saccade.companions import find_companion
from saccade.dualspeed import DualSpeedTrainer
from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.checkpoint import checkpoints
from saccade.dualspeed.checks import check_at_hand, check_full_batch, check_one_gpu
from saccade.dualspeed.collator import BAD_RECORDS
from saccade.dualspeed.folder import LOG_FILE, agreed, check_not_removed, check_unused, hold
from saccade.errors import SaccadeError, did_you_mean
from saccade.families import get_family
from saccade.families.padding import check_aspect_ratio
from saccade.files import disk_errors, write_json_atomically
from saccade.launch import check_engine
from saccade.pruning import ISOLATOR_FILE
from saccade.report.environment import environment
from saccade.skip_vision import SUMMARY_FILE
from saccade.training.console import Bar, Console
from saccade.training.models import check_family, load_model
from saccade.training.recipe import Recipe
from saccade.training.sources import DIGITS, check_rows, dataset_name, hold_out, load_eval_rows, load_rows


def train_recipe(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> DualSpeedTrainer:
    """Train a recipe and save model, processor, isolator and log in its `output_dir`.

    Returns:
        The trainer after training. If SIGTERM ended it, `trainer.sigterm.stopped` is true and only a checkpoint saved.

    Raises:
        SaccadeError: on bad input, before training starts.
        OSError: if a file cannot be written, for example on a full disk.
    """
    args = recipe.trainer
    check_one_gpu(args)
    with ExitStack() as held:
        # Locked from before anything is written until the model is saved.
        agreed(args, lambda: held.enter_context(hold(args)))
        resume = agreed(args, lambda: find_resume(recipe))
        with disk_errors(args.output_dir):
            return _train_and_save(recipe, resume, callbacks)


def _train_and_save(
    recipe: Recipe, resume: str | bool | None, callbacks: list[TrainerCallback] | None
) -> DualSpeedTrainer:
    options, args = recipe.options, recipe.trainer
    check_recipe(recipe)
    if args.image_aspect_ratio is not None and options.model != "tiny":
        check_aspect_ratio(check_family(options.model, args.trust_remote_code), args.image_aspect_ratio)
    dataset = load_rows(options, shards=args.world_size * max(1, args.dataloader_num_workers))
    eval_dataset = load_eval_rows(options)
    if options.eval_share is not None:
        dataset, eval_dataset = hold_out(dataset, options.eval_share, options.dataset_seed, options.eval_rows)
    if isinstance(dataset, Sized):
        check_full_batch(args, len(dataset))
    model, processor = load_model(options, args.trust_remote_code)
    if options.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    beside = find_companion(options.model, ISOLATOR_FILE)
    if args.isolator_path is None and args.isolator_length and beside is not None:
        args.isolator_path = str(beside)
    if options.lora and not model.config._name_or_path:
        # Adapters refer to their base model by path, and this one was not loaded from a folder.
        base = Path(args.output_dir) / "base"
        if args.should_save:
            model.save_pretrained(base)
        model.config._name_or_path = model.name_or_path = str(base)
    trainer = DualSpeedTrainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=lora_config(model, recipe) if options.lora else None,
        callbacks=callbacks,
    )
    if trainer.skip is not None and find_companion(options.model, SUMMARY_FILE) is not None:
        # Adapters were merged into their base, beside which the trainer has looked.
        trainer.skip.load_summary(options.model)
    check_engine(trainer.accelerator)
    # So that a bad first batch, such as a max_length below the image tokens, shows before the first step.
    visual_tokens = check_first_rows(trainer)
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    if sys.stderr.isatty() and not args.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(Console(trainer, options.model, dataset_name(options), visual_tokens))
    # A signal while the model is being saved has no effect: the run is about to end anyway.
    with trainer.sigterm.listening():
        trainer.train(resume_from_checkpoint=resume)
        if trainer.sigterm.stopped:
            # The next run resumes from the checkpoint; saving a final model would make training look finished.
            return trainer
        trainer.save_model(args.output_dir)
        log = Path(args.output_dir) / LOG_FILE
        # A finished run that was resumed, and had no step left, keeps its own.
        if args.should_save and not log.is_file():
            record = {
                "recipe": recipe.given,
                "local_model": Path(options.model).exists(),
                "run_id": trainer.run_id,
                "log_history": trainer.state.log_history,
                "environment": environment(),
                "finished": date.today().isoformat(),
            }
            write_json_atomically(log, record)
    return trainer


def check_first_rows(trainer: DualSpeedTrainer) -> int:
    """Make a batch of the first two rows.

    Returns:
        The visual tokens of the first.
    """
    batch = trainer.training_collator()(list(islice(trainer.train_dataset, 2)))
    found = BadRecordLog(trainer.args.output_dir, trainer.args.max_bad_records)
    found.add(batch.get(BAD_RECORDS, ()))
    if found and trainer.args.should_save:
        found.write()
    found.check()
    return int((batch["input_ids"][0] == trainer.family.placeholder_id).sum())


def check_recipe(recipe: Recipe) -> None:
    """Check, before anything is loaded, for what would make a run fail later."""
    check_dataset_given(recipe, recipe.given.get("model"))
    check_lora(recipe)
    check_evaluation(recipe)
    _check_effect(recipe, "dataset_streaming", ("dataset_shuffle_buffer",))
    _check_effect(recipe, "image_urls", ("image_cache",))
    check_rows(recipe.options)
    check_at_hand(recipe.trainer)


def check_dataset_given(recipe: Recipe, model: str | None) -> None:
    """Refuse a recipe without data for a model of the user's: the embedded scenes are the default for the embedded
    model alone.

    Args:
        model: what the recipe names, or the first of the stages that it belongs to; None if neither does.
    """
    if model not in (None, "tiny") and "dataset" not in recipe.given:
        raise SaccadeError(
            f"model={model!r} without a dataset would train on the embedded scenes of digits: give "
            f"dataset, or dataset: {DIGITS} if you mean them"
        )


def check_evaluation(recipe: Recipe) -> None:
    """Refuse rows to evaluate on that would never be used, and evaluation without rows."""
    options, strategy = recipe.options, recipe.trainer.eval_strategy
    if options.eval_dataset is not None and options.eval_share is not None:
        raise SaccadeError(
            f"eval_dataset={options.eval_dataset!r} and eval_share={options.eval_share} both say what to evaluate on: "
            "leave one of them out"
        )
    given = {name: getattr(options, name) for name in ("eval_dataset", "eval_share")}
    name, value = next(((name, value) for name, value in given.items() if value is not None), (None, None))
    if name is None:
        if strategy != "no":
            raise SaccadeError(f"eval_strategy={strategy.value!r} has no rows: give eval_dataset or eval_share")
        if options.eval_rows is not None:
            raise SaccadeError(f"eval_rows={options.eval_rows} of nothing: give eval_dataset or eval_share")
        return
    if strategy == "no":
        raise SaccadeError(f"{name}={value!r} is never used with eval_strategy='no': use 'steps' or 'epoch'")
    if options.eval_rows is not None and options.eval_rows < 1:
        raise SaccadeError(f"eval_rows={options.eval_rows}: give at least 1, or leave it out for all")
    if options.eval_share is not None:
        if not 0 < options.eval_share < 1:
            raise SaccadeError(f"eval_share={options.eval_share} is outside (0, 1): it is a share of the rows")
        if options.dataset_streaming:
            raise SaccadeError(
                f"eval_share={options.eval_share} of a stream, whose length is not known: give eval_dataset, "
                "or set dataset_streaming to false"
            )


def check_lora(recipe: Recipe) -> None:
    """Check the options of adapters."""
    options = recipe.options
    _check_effect(recipe, "lora", [name for name in vars(options) if name.startswith("lora_")])
    if options.load_in_4bit and not options.lora:
        raise SaccadeError("load_in_4bit=true freezes the language model in four bits: train adapters with lora=true")
    if not options.lora:
        return
    if recipe.trainer.freeze_language_model:
        raise SaccadeError(
            "lora=true trains the language model, freeze_language_model=true freezes it: set one to false"
        )
    for name in ("lora_r", "lora_alpha"):
        if getattr(options, name) < 1:
            raise SaccadeError(f"{name}={getattr(options, name)}: give 1 or more")
    if not 0 <= options.lora_dropout < 1:
        raise SaccadeError(f"lora_dropout={options.lora_dropout} is outside [0, 1)")
    if (Path(options.model) / "adapter_config.json").is_file():
        raise SaccadeError(
            f"model={options.model!r} contains LoRA adapters, and new ones would refer to a base without them: "
            "set lora to false, or merge them into a model first"
        )


def _check_effect(recipe: Recipe, needed: str, names: Iterable[str]) -> None:
    """Refuse fields without effect in a recipe that does not say anything of the one that they need."""
    for name in names:
        if recipe.given.get(name) is not None and needed not in recipe.given:
            raise SaccadeError(f"{name}={recipe.given[name]!r} has no effect without {needed}: give both, or neither")


def lora_config(model, recipe: Recipe) -> LoraConfig:
    """Adapters on every linear layer of the decoder and a fully trained projector, as in the published recipe, or what
    the recipe names instead.
    """
    options = recipe.options
    family = get_family(model)
    names = {id(module): name for name, module in family.model.named_modules()}
    layers = names[id(family.language_layers)]
    targets, saved = options.lora_target_modules, options.lora_modules_to_save
    _check_modules("lora_target_modules", targets, names.values())
    _check_modules("lora_modules_to_save", saved, names.values())
    if saved is None and not recipe.trainer.freeze_projector:
        saved = _projector_names(family.projector, names)
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets or _linear_layers(layers, family.language_layers),
        modules_to_save=saved,
        task_type="CAUSAL_LM",
    )


def _linear_layers(name: str, layers: nn.ModuleList) -> str:
    """A regular expression for every linear layer of the decoder, whose layers are the module `name`."""
    ends = {one.rpartition(".")[2] for one, module in layers.named_modules() if isinstance(module, nn.Linear)}
    # In most models: what is recorded of a run stays short, and as it was.
    words = ".*_proj" if all(end.endswith("_proj") for end in ends) else rf"(.*\.)?({'|'.join(sorted(ends))})"
    return rf"{name}\.\d+\.{words}".replace(".layers", r"\.layers")


def _check_modules(field: str, given: str | list[str] | None, names: Collection[str]) -> None:
    """Refuse a name that PEFT would find no module for. It complains only if it finds none for all of them."""
    if given is None or given == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    if isinstance(given, str):
        try:
            missing = [] if any(re.fullmatch(given, name) for name in names) else [given]
        except re.error as error:
            raise SaccadeError(f"{field}={given!r} is not a regular expression: {error}") from error
    else:
        missing = [one for one in given if not any(f".{name}".endswith(f".{one}") for name in names)]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in names if name} - {""})
        hint = did_you_mean(missing[0], ends, "give the last part of a module's name, such as 'q_proj'")
        raise SaccadeError(f"{field}: the model has no module {missing[0]!r}: {hint}")


def _projector_names(projector: nn.Module, names: dict[int, str]) -> list[str]:
    """The projector's names for PEFT, which cannot save a module list, only the modules in it."""
    if not isinstance(projector, nn.ModuleList):
        return [names[id(projector)].rpartition(".")[2]]
    return [
        name
        for child in projector
        for name in (
            [".".join(names[id(one)].split(".")[-2:]) for one in child]
            if isinstance(child, nn.ModuleList)
            else _projector_names(child, names)
        )
    ]


def find_resume(recipe: Recipe) -> str | bool | None:
    """The `resume_from_checkpoint` argument of `DualSpeedTrainer.train`."""
    options, args = recipe.options, recipe.trainer
    if options.resume is not None and args.overwrite:
        raise SaccadeError(f"resume={options.resume!r} needs what overwrite=true removes: leave one of them out")
    if options.resume not in (None, "auto"):
        if not Path(options.resume).is_dir():
            raise SaccadeError(
                f"resume={options.resume!r} is not a folder: name a checkpoint, or 'auto' for the newest whole one"
            )
        return options.resume
    if options.resume == "auto" and checkpoints(args.output_dir):
        return True
    if args.overwrite:
        for name, value in (("model", options.model), ("isolator_path", args.isolator_path)):
            check_not_removed(value, args.output_dir, name)
    else:
        check_unused(args.output_dir)
    return None
