"""`DualSpeedTrainer`: TRL's `SFTTrainer` with fast and slow steps."""

import shutil
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from saccade.companions import find_companion
from saccade.data.turns import is_plain_text
from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.checkpoint import (
    adapter_options,
    check_same_run,
    load_weights_strictly,
    publish_checkpoint,
    remove_old_checkpoints,
    remove_other_kind,
    resolve_resume,
)
from saccade.dualspeed.checks import (
    as_bad_input,
    check_at_hand,
    check_family_can,
    check_language_model_trains,
    check_not_ignored,
    check_precision,
    first_columns,
)
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.dualspeed.compiling import compile_layers
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.folder import (
    MEASURED,
    PARTIAL_DIR,
    RUN_FILE,
    agreed,
    claim,
    hold,
    new_id,
    read_run_file,
    write_run_file,
)
from saccade.dualspeed.identity import identify_model, identify_processor, identify_rows
from saccade.dualspeed.labels import check_turns, stop_ids
from saccade.dualspeed.metrics import ModeMeter, StepClock
from saccade.dualspeed.modes import Mode
from saccade.dualspeed.packing import allow_packing
from saccade.dualspeed.sampler import EpochStart
from saccade.dualspeed.schedule import ModeSchedule
from saccade.dualspeed.sharding import WithBlankImage, gathered, layer_classes
from saccade.dualspeed.start import freeze_parts, load_by_name, load_config
from saccade.dualspeed.step import DualSpeedStep, ModePlan
from saccade.dualspeed.stepping import SteppingTrainer
from saccade.dualspeed.watch import RunWatch
from saccade.errors import SaccadeError
from saccade.families import family_class, get_family, stock_model, use_released_names
from saccade.families.fitting import check_processor
from saccade.families.padding import check_aspect_ratio, pad_to_square
from saccade.files import disk_errors
from saccade.pruning import ISOLATOR_FILE, Method, ModeIsolator, Pruner
from saccade.skip_vision import SUMMARY_FILE, SUMMARY_NAME, Skipper, SkipVision, apply_skip_vision

ISOLATOR_NAME = "mode_isolator"


class DualSpeedTrainer(SteppingTrainer):
    """
    Trainer for fast-slow fine-tuning of a vision-language model (DualSpeed, arXiv 2602.03815).

    Takes what [`~trl.SFTTrainer`] takes. The dataset has `messages` (or `prompt` and `completion`) and `images`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A stock model of a known family, or the folder or id to load it from.
        args ([`DualSpeedConfig`]):
            Options of the run.
        kwargs:
            `train_dataset`, `processing_class`, `peft_config` and the rest, as for [`~trl.SFTTrainer`].

    Raises:
        SaccadeError: on a model without a family, a dataset without images, or an isolator that does not fit.
    """

    _tag_names = ("trl", "saccade", "dualspeed")

    def __init__(self, model: str | PreTrainedModel, args: DualSpeedConfig, *, train_dataset, **kwargs: Any) -> None:
        if not isinstance(args, DualSpeedConfig):
            raise SaccadeError(
                f"args is a {type(args).__name__}: give a DualSpeedConfig, which takes the same options"
            )
        check_at_hand(args)
        config = stock_model(model).config if isinstance(model, nn.Module) else load_config(model, args)
        check_aspect_ratio(family_class(config), args.image_aspect_ratio)
        columns = first_columns(train_dataset)
        if not args.takes_stock_steps:
            check_not_ignored(model, kwargs.get("peft_config"), kwargs.get("compute_loss_func"))
        if args.group_by != "none" and not isinstance(train_dataset, Sized):
            raise SaccadeError(
                f"group_by={args.group_by!r} needs to know every length, and a stream does not: use 'none'"
            )
        # The collator takes what it needs of a row; the stock trainer would drop columns that rows are made from.
        args.remove_unused_columns = False
        if args.assistant_only_loss is None:
            args.assistant_only_loss = "messages" in columns
        own_collator = kwargs.get("data_collator") is None
        if isinstance(model, str):
            model = load_by_name(model, args, kwargs.get("quantization_config"))
        check_precision(model, args)
        with _withheld(args), as_bad_input():
            super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        # Some stock classes say that their loss takes no normaliser. This trainer's losses do, for every family: the
        # labels of the global batch, however it is cut into micro-batches and ranks.
        self.model_accepts_loss_kwargs = True
        self.family = get_family(self.model)
        check_processor(self.processing_class, self.family.model.config)
        use_released_names(self.family.model)
        if args.image_aspect_ratio is not None:
            pad_to_square(self.processing_class)
        self._speed_up()
        if own_collator:
            self.data_collator = DualSpeedCollator(
                processor=self.processing_class,
                max_length=args.max_length,
                completion_only_loss=self.completion_only_loss,
                pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None,
                dataset_text_field=args.dataset_text_field,
                assistant_only_loss=args.assistant_only_loss,
                placeholder_id=self.family.placeholder_id,
                conversation=args.conversation,
                stop_ids=stop_ids(self.family.model.generation_config, self._tokenizer),
                max_image_pixels=args.max_image_pixels,
            )
            if args.conversation == "chat" and not is_plain_text(next(iter(train_dataset))):
                check_turns(self.data_collator)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.data_collator = WithBlankImage(self.data_collator, self.family.placeholder_id, self.processing_class)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            classes = layer_classes(self.family.model, self.family.language_layers)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = classes
        self._freeze()
        self.modes = args.all_modes()
        check_family_can(self.family, self.modes)
        self.open_feature_cache()
        self.schedule = self._stage_schedule()
        self.is_ordinary = args.takes_stock_steps
        self.isolator = self._attach_isolator()
        self.skip = self._apply_skip_vision()
        self.choose_masters()
        self.meter = ModeMeter(
            [mode.name for mode in self.modes],
            full=next((mode.name for mode in self.modes if mode.keeps_all), None),
            taught=[mode.name for mode in self.modes if mode.teacher is not None],
        )
        self.add_callback(StepClock(self))
        self.add_callback(EpochStart())
        self.bad_records = BadRecordLog(args.output_dir, args.max_bad_records)
        self.run_id: str | None = None
        self._identity: dict[str, Any] | None = None
        self.watch = RunWatch(self)
        self.add_callback(self.watch)
        self._micro_batch = 0
        methods = {mode.name: self._method(mode) for mode in self.modes}
        plans = {
            mode.name: ModePlan(methods[mode.name], ModePlan(methods[mode.teacher]) if mode.teacher else None)
            for mode in self.modes
        }
        self._step = DualSpeedStep(
            family=self.family,
            modes=plans,
            distill_weight=args.distill_weight,
            distill_temperature=args.distill_temperature,
            padding_free=args.padding_free,
        )

    def _speed_up(self) -> None:
        """Do what the options for speed ask for.

        Raises:
            SaccadeError: where the model or the engine cannot.
        """
        args = self.args
        if args.padding_free:
            allow_packing(self.family)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if args.slow_micro_batch_size is not None:
                raise SaccadeError(
                    f"slow_micro_batch_size={args.slow_micro_batch_size}: FSDP and DeepSpeed count backward passes; "
                    "use a smaller per_device_train_batch_size with more gradient_accumulation_steps"
                )
            if args.torch_compile:
                raise SaccadeError("torch_compile=True is not known to work under FSDP and DeepSpeed: set it to false")
        if args.torch_compile:
            compile_layers(self.family, args.torch_compile_backend, args.torch_compile_mode)

    def _method(self, mode: Mode) -> Method | None:
        """What a mode does with the visual tokens; None keeps all."""
        if mode.action == "keep":
            return None
        if mode.action == "skip":
            return Skipper(self.family, mode.skip_vision, self.skip.summary)
        return Pruner(mode.pruning, self.isolator if mode.isolator else None)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.watch.check(grad_norm)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            metrics = self.meter.read(self.sum_over_ranks)
            logs = {**logs, **{name: round(value, 6) for name, value in metrics.items()}}
            if self.bad_records:
                logs["bad_records"] = len(self.bad_records)
            # TRL's own count, which it logs in evaluation too, is of batches before they are shortened.
            self._total_train_tokens = int(metrics["num_tokens"])
        super().log(logs, start_time)

    # Weights, isolator, checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one in `output_dir` of the run
                that the folder belongs to.

        On SIGTERM it saves a checkpoint and returns; `watch.stopped` is then true. On Ctrl-C it does so too, and ends
        with an `Interrupted`, which is a `KeyboardInterrupt`.

        Raises:
            SaccadeError: if `output_dir` holds what another run left and `args.overwrite` is not set, or another run
                is writing there; if there is no whole checkpoint, or it was trained with other options, rows or
                another model; if a loss is not finite, or a process that prepares batches dies.
            OSError: if a checkpoint cannot be written, a full disk included; the last one stays.
        """
        if self.model is self.family.model:
            check_language_model_trains(self.family, self.args)
        with ExitStack() as held:
            agreed(self.args, lambda: held.enter_context(hold(self.args)))
            return self._train_in_its_folder(resume_from_checkpoint, **kwargs)

    def _train_in_its_folder(self, resume: str | bool | None, **kwargs: Any):
        args = self.args
        checkpoint = agreed(args, lambda: resolve_resume(resume, args.output_dir))
        found = None if checkpoint is None else agreed(args, lambda: (read_run_file(checkpoint) or {}).get("run_id"))
        self.run_id = agreed(args, lambda: found or new_id())
        self._identity = agreed(args, self._identify)
        if checkpoint is not None:
            check_same_run(checkpoint, self._resume_state())
        agreed(args, lambda: claim(args.output_dir, self.run_id, checkpoint, args.overwrite))
        if checkpoint is None:
            if args.should_save:
                self.bad_records.path.unlink(missing_ok=True)
        else:
            self.bad_records.read()
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if 0 < args.max_steps <= state.global_step:
                # The stock loop looks at max_steps after a step, and would train one too many.
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        try:
            with self.watch.training():
                return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        except Exception as error:
            # By its name: it comes from the module that nothing here imports.
            if type(error).__name__ != "UnpicklingError":
                raise
            raise SaccadeError(
                f"resume_from_checkpoint={str(checkpoint)!r} holds something other than tensors and plain values, "
                "which could run code: resume from a checkpoint of your own"
            ) from error
        finally:
            self.end_workers()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, processor, isolator, and what they were trained with. All ranks must call it.

        Raises:
            OSError: if a file cannot be written, a full disk included.
        """
        with self.watch.saving():
            self._save_all(output_dir, _internal_call)

    def _save_all(self, output_dir: str | None, internal: bool) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            # While they are written the weights are nobody's, and what was measured on others is theirs no more.
            for name in (RUN_FILE, *MEASURED):
                (folder / name).unlink(missing_ok=True)
        with disk_errors(folder):
            super().save_model(output_dir, internal)
        weight = None if self.isolator is None else gathered(self.isolator.weight)
        head = None if self.skip is None else self.skip.summary
        summary = {} if head is None else {name: gathered(value) for name, value in head.named_parameters()}
        if self.args.should_save:
            state = self._resume_state()
            remove_other_kind(
                folder,
                adapters=self.model is not self.family.model,
                isolator=self.isolator is not None,
                prunes=any(mode.action == "drop" for mode in self.modes),
                skips=self.skip is not None,
            )
            if self.isolator is not None:
                self.isolator.save(folder, metadata=state, weight=weight)
            if self.skip is not None:
                self.skip.save(folder, tensors=summary)
            pruned = next((mode for mode in self.modes if mode.action == "drop" and not mode.pruning.keeps_all), None)
            if pruned is not None:
                pruned.pruning.replace(isolator=str(folder) if pruned.isolator else None).save_pretrained(folder)
            write_run_file(folder, state, self.run_id, global_step=self.state.global_step, tokens=self.meter.tokens)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self.args.output_dir)
        partial = run_dir / PARTIAL_DIR
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            with disk_errors(run_dir):
                super()._save_checkpoint(model, trial)
        except BaseException:
            # What was written so far frees the room that the next attempt needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).is_relative_to(partial):
            self.state.best_model_checkpoint = str(run_dir / Path(best).relative_to(partial))
        if self.args.should_save:
            folder = partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            try:
                if best != self.state.best_model_checkpoint:
                    self.state.save_to_json(str(folder / "trainer_state.json"))
                written = publish_checkpoint(partial, run_dir)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            remove_old_checkpoints(written, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        stock = self.model if model is None else model
        if isinstance(stock, PreTrainedModel) and not self.is_fsdp_enabled:
            own = {f"{ISOLATOR_NAME}.weight"}
            if self.skip is not None and self.skip.summary is not None:
                own |= {f"{SUMMARY_NAME}.{name}" for name in self.skip.summary.state_dict()}
            load_weights_strictly(stock, checkpoint, ignored=own)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.isolator is not None:
            self._copy_isolator(ModeIsolator.load(checkpoint))
        if self.skip is not None:
            self.skip.load(checkpoint)
        self.meter.tokens.update((read_run_file(checkpoint) or {}).get("tokens", {}))

    def _resume_state(self) -> dict[str, Any]:
        """What a run that goes on from this one must share with it."""
        args, engine = self.args, self.engine
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # DeepSpeed writes each rank's shard of the optimizer, which another number of ranks cannot read.
        ranks = {"num_processes": args.world_size} if engine == "deepspeed" else {}
        masters = {"float32_masters": self.keeps_masters}
        state = {**args.resume_state(), **masters, "global_batch_size": batch, "engine": engine, **ranks}
        return {**state, "adapters": adapter_options(self.model), **(self._identity or {})}

    def _identify(self) -> dict[str, Any]:
        """What the run is trained on and from."""
        rows = identify_rows(self.train_dataset)
        if rows["rows"] is None:
            # Each process and each of its workers reads its own part of a stream.
            rows |= {"readers": self.args.world_size * max(1, self.args.dataloader_num_workers)}
        return {
            "data": rows,
            "model": identify_model(self.model, self.family.model.config, self.model is not self.family.model),
            "processor": identify_processor(self.processing_class),
        }

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
            if self.isolator is not None:
                self._copy_isolator(ModeIsolator.load(self.state.best_model_checkpoint))
            if self.skip is not None:
                self.skip.load(self.state.best_model_checkpoint)

    def _freeze(self) -> None:
        """Freeze what the options say. PEFT decides for itself what trains, so nothing is done under it."""
        if self.model is self.family.model:
            freeze_parts(self.family, self.args)

    def _stage_schedule(self) -> ModeSchedule:
        """The configured schedule, or an always fast one if no parameter of the decoder layers trains."""
        trains = any(parameter.requires_grad for parameter in self.family.language_layers.parameters())
        if trains or self.args.is_ordinary:
            return self.args.mode_schedule()
        return ModeSchedule(self.args.seed, {mode.name: float(mode is self.modes[0]) for mode in self.modes})

    def _attach_isolator(self) -> ModeIsolator | None:
        if self.args.is_ordinary or not any(mode.isolator for mode in self.modes):
            return None
        width = self.family.model.config.get_text_config().hidden_size
        # In bf16 its entries are too coarse to move at fine-tuning rates; sharding engines want one dtype for all.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        isolator = ModeIsolator(
            self.args.isolator_length, width, self.family.model.dtype if sharded else torch.float32
        )
        self.isolator = isolator.to(self.family.model.device)
        source = self.args.isolator_path
        # An earlier run of this very model left its own.
        held = getattr(self.model, ISOLATOR_NAME, None)
        if source is None and held is not None and held.weight.shape == isolator.weight.shape:
            self._copy_isolator(held)
            # It may hang on the stock model, with adapters around that since.
            self.family.model._modules.pop(ISOLATOR_NAME, None)
        elif source is None and self.family.model.config._name_or_path:
            beside = find_companion(self.family.model.config._name_or_path, ISOLATOR_FILE)
            source = None if beside is None else str(beside)
        if source is not None:
            self._copy_isolator(ModeIsolator.load(source), source)
        self.model.add_module(ISOLATOR_NAME, isolator)
        for module in {self.model, self.family.model}:
            if isinstance(module, PreTrainedModel):
                ignored = set(module._keys_to_ignore_on_save or ())
                module._keys_to_ignore_on_save = ignored | {f"{ISOLATOR_NAME}.weight"}
        return isolator

    def _apply_skip_vision(self) -> SkipVision | None:
        skipping = [mode.skip_vision for mode in self.modes if mode.action == "skip"]
        if not skipping:
            return None
        # What text sees, and which layers skip, belongs to the model and is alike in all modes.
        skip = apply_skip_vision(self.model, skipping[0])
        if skip.summary is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                skip.summary.to(self.family.model.dtype)
            source = self.family.model.config._name_or_path
            if source and find_companion(source, SUMMARY_FILE):
                skip.load(source)
        return skip

    def _copy_isolator(self, loaded: ModeIsolator, source: str = "the checkpoint") -> None:
        if loaded.weight.shape != self.isolator.weight.shape:
            raise SaccadeError(
                f"isolator_length={self.isolator.length}: the isolator from {source} has shape "
                f"{tuple(loaded.weight.shape)}, this run needs {tuple(self.isolator.weight.shape)}; "
                "set isolator_length to fit, or isolator_path to another one"
            )
        weight = loaded.weight.detach().to(self.isolator.weight)
        if isinstance(self.isolator.weight, DTensor):
            weight = distribute_tensor(weight, self.isolator.weight.device_mesh, self.isolator.weight.placements)
        with torch.no_grad():
            self.isolator.weight.copy_(weight)


@contextmanager
def _withheld(args: DualSpeedConfig) -> Iterator[None]:
    """Hide the options that this trainer acts on itself.

    TRL refuses `padding_free` for images: its collator would join rows before their images are encoded. Accelerate
    would compile the whole model, whose forward is redirected. For `assistant_only_loss` TRL wants marks in the chat
    template, and the collator needs none.
    """
    withheld = {"padding_free": False, "torch_compile": False, "assistant_only_loss": False}
    withheld |= {"torch_compile_backend": None, "torch_compile_mode": None}
    before = {name: getattr(args, name) for name in withheld}
    for name, value in withheld.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
