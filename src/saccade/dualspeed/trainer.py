"""`DualSpeedTrainer`: TRL's `SFTTrainer` with fast and slow steps."""

import logging
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from saccade.companions import copy_whole, find_companion
from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.data.turns import is_plain_text
from saccade.dualspeed import checks
from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.callbacks import NonFiniteGuard
from saccade.dualspeed.casts import spare_casts
from saccade.dualspeed.checkpoint import load_weights_strictly, remove_other_kind, step_of
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.dualspeed.compiling import compile_layers
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.engines import DummyImageCollator, gathered, layer_classes, redirect_forward
from saccade.dualspeed.folder import MEASURED, RUN_FILE, read_run_file, write_run_file
from saccade.dualspeed.labels import check_turns, stop_ids
from saccade.dualspeed.masters import Float32Masters, wants_masters
from saccade.dualspeed.metrics import ModeMeter, StepClock
from saccade.dualspeed.modes import ModeConfig, ModeSchedule
from saccade.dualspeed.packing import allow_packing, packing_pays
from saccade.dualspeed.parts import InParts
from saccade.dualspeed.resumable import ResumableTrainer
from saccade.dualspeed.sampler import EpochStart, GroupedSampler
from saccade.dualspeed.step import DualSpeedStep, ModePlan, StepOutput
from saccade.dualspeed.weights import load_by_name
from saccade.errors import SaccadeError, kind_of
from saccade.families import Family, family_class, get_family, stock_model, use_released_names
from saccade.families.cache import FeatureCache
from saccade.families.fitting import check_processor
from saccade.families.linear_patches import use_linear_patches, warn_of_slow_patches
from saccade.families.padding import check_aspect_ratio, pad_to_square
from saccade.families.tower import depths_below_features
from saccade.files import check_entries, disk_errors, reading
from saccade.interfaces import check_methods
from saccade.model_files import check_files
from saccade.pruning import ISOLATOR_FILE, Method, ModeIsolator, Pruner
from saccade.reducers import PruningConfig
from saccade.skip_vision import SUMMARY_FILE, SUMMARY_NAME, Skipper, SkipVision, apply_skip_vision
from saccade.tokens import IGNORE_INDEX

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
ISOLATOR_NAME = "mode_isolator"
REPLACED = (
    *("_finalize_training", "_get_grad_norm", "_get_train_sampler", "_init_training_state", "_load_best_model"),
    *("_load_callback_state", "_load_from_checkpoint", "_load_rng_state", "_push_from_checkpoint", "_run_epoch"),
    "_save",
    *("_load_optimizer_and_scheduler", "_save_checkpoint", "_save_optimizer_and_scheduler", "compute_loss", "log"),
    *("compute_loss_context_manager", "create_optimizer", "evaluation_loop", "get_batch_samples", "prediction_step"),
    *("get_eval_dataloader", "get_test_dataloader", "get_train_dataloader", "save_model", "train"),
)
"""Methods of the stock trainer that are overridden: if one is renamed, the override is never called."""
check_methods(SFTTrainer, REPLACED, "transformers")


class DualSpeedTrainer(ResumableTrainer):
    """
    Trainer for fast-slow fine-tuning of a vision-language model (DualSpeed, arXiv 2602.03815).

    Takes what [`~trl.SFTTrainer`] takes.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A stock model of a known family, or the folder or id to load it from.
        args ([`DualSpeedConfig`]):
            Options of the run.
        data_collator (`Callable`, *optional*):
            Makes a batch of rows. When left out, a [`DualSpeedCollator`] with the options of `args`; one of your own
            returns what the processor does, and `labels`, of which those of image tokens, of padding and of the first
            token of a row are ignored.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, or `prompt` and `completion`, and `images`: PIL images, paths, or mappings with
            "bytes" or "path". A stream needs `max_steps`.
        eval_dataset (dataset or `dict` of datasets, *optional*):
            Rows to evaluate on, as those to train on.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor. When left out, loaded from where the model comes from.
        compute_loss_func (`Callable`, *optional*):
            A loss in place of the cross-entropy. Only with the options of ordinary fine-tuning.
        compute_metrics (`Callable`, *optional*):
            Metrics of an evaluation, of an [`~transformers.EvalPrediction`]. Not with modes that skip or `fit_slow`,
            whose evaluations compute the loss alone.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks beside the trainer's own.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            An optimizer and a learning-rate scheduler in place of those that `args` names. The optimizer is given the
            isolator and the summary head too, with the options of its first group.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            An optimizer class and its arguments, in place of `optim` and `optim_args`.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            What becomes of logits and labels before an evaluation keeps them.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How the weights are quantized where the model is loaded by its name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters to train in place of the language model's weights. Without one the model is not wrapped.
        formatting_func (`Callable`, *optional*):
            Makes a text of a row, as in TRL.

    Raises:
        SaccadeError: on a model without a family, a dataset without images, an isolator that does not fit, or an
            optimizer that leaves out weights that train.
    """

    _tag_names = ("trl", "saccade", "dualspeed")
    feature_cache: FeatureCache | None = None
    masters: Float32Masters | None = None
    """The float32 masters, once training has begun, if the trainer keeps them itself."""
    _rows_before: tuple[int, int] = (0, 0)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DualSpeedConfig,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Rows | DatasetDict | IterableDatasetDict | dict[str, Rows] | None = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        if not isinstance(args, DualSpeedConfig):
            raise SaccadeError(f"args is {kind_of(args)}: give a DualSpeedConfig, which takes the same options")
        checks.check_at_hand(args)
        checks.check_metrics(args, compute_metrics)
        if isinstance(model, nn.Module):
            config, placed = stock_model(model).config, getattr(model, "hf_device_map", None)
        else:
            placed = (args.model_init_kwargs or {}).get("device_map")
            check_entries(model, "model")
            with reading(f"model={model!r} cannot be loaded"):
                config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        if placed is None:  # else the model may be split over the GPUs, which TRL finds out once it has it
            checks.check_one_gpu(args)
        check_aspect_ratio(family_class(config), args.image_aspect_ratio)
        columns = checks.first_columns(train_dataset)
        if not args.takes_stock_steps:
            checks.check_not_ignored(model, peft_config, compute_loss_func)
        if args.group_by != "none" and not isinstance(train_dataset, Sized):
            raise SaccadeError(
                f"group_by={args.group_by!r} needs to know every length, and a stream does not: use 'none'"
            )
        # The collator selects columns itself; the stock trainer would drop columns that rows are made from.
        args.remove_unused_columns = False
        # If nobody said so, streams are dispatched from rank 0, whose lists of bad records would be lost.
        args.accelerator_config.dispatch_batches = False
        if args.assistant_only_loss is None:
            args.assistant_only_loss = "messages" in columns
        own_collator = data_collator is None
        if isinstance(model, str):
            model = load_by_name(model, args, quantization_config)
        checks.check_precision(model, args)
        with _withheld(args), checks.as_bad_input():
            super().__init__(
                model,
                args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        # Some stock classes declare that their loss takes no normaliser. This trainer's losses do, for every family:
        # the number of labels in the global batch, however it is split into micro-batches and ranks.
        self.model_accepts_loss_kwargs = True
        checks.check_adapters(self.model)
        self.family = get_family(self.model)
        check_processor(self.processing_class, self.family.model.config)
        use_released_names(self.family.model)
        if args.vision_layer_decay is not None:
            self._tower_depths()  # before anything long starts
        if args.image_aspect_ratio is not None:
            pad_to_square(self.processing_class)
        self._speed_up()
        if own_collator:
            fitting = [
                mode for mode in args.all_modes() if mode.action == "drop" and mode.pruning.fit_length is not None
            ]
            self.data_collator = DualSpeedCollator(
                processor=self.processing_class,
                max_length=args.max_length,
                fit_length=min((mode.pruning.fit_length for mode in fitting), default=None),
                isolator_length=args.isolator_length if any(mode.isolator for mode in fitting) else 0,
                completion_only_loss=self.completion_only_loss,
                pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None,
                dataset_text_field=args.dataset_text_field,
                assistant_only_loss=args.assistant_only_loss,
                placeholder_id=self.family.placeholder_id,
                conversation=args.conversation,
                stop_ids=stop_ids(self.family.model.generation_config, self._tokenizer),
                max_image_pixels=args.max_image_pixels,
                sampling=args.sampling,
            )
            if args.conversation == "chat" and not is_plain_text(next(iter(train_dataset))):
                check_turns(self.data_collator)
        if self.engine != "ddp":
            self.data_collator = DummyImageCollator(
                self.data_collator, self.family.placeholder_id, self.processing_class
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            classes = layer_classes(self.family.model, self.family.language_layers)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = classes
        if self.model is self.family.model:  # PEFT decides itself what trains
            freeze_parts(self.family, args)
        self.modes = args.all_modes()
        for mode in self.modes:
            self.family.check_gives(mode.needs)
        self.open_feature_cache()
        self.schedule = self._stage_schedule()
        self.is_ordinary = args.takes_stock_steps
        self._adapters_loaded = isinstance(model, PeftModel) and have_learned(model)
        self.isolator = self._attach_isolator()
        self.skip = self._apply_skip_vision()
        if self.optimizer is not None:
            self._complete(self.optimizer)
        self.keeps_masters = wants_masters(args, self.model, self.engine, self.accelerator.mixed_precision != "no")
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        self.meter = ModeMeter(self.modes)
        self.add_callback(StepClock(self))
        self.add_callback(EpochStart())
        self.bad_records = BadRecordLog(args.output_dir, args.max_bad_records)
        self._attach_run()
        self.guard = NonFiniteGuard(self)
        self.add_callback(self.guard)
        self.micro_batch = 0
        """Micro-batches of the current step so far."""
        methods = {mode.name: self._method(mode) for mode in self.modes}
        plans = {
            mode.name: ModePlan(methods[mode.name], ModePlan(methods[mode.teacher]) if mode.teacher else None)
            for mode in self.modes
        }
        self._changing = [(mode, methods[mode.name]) for mode in self.modes if mode.ratio_changes]
        """Modes whose ratio changes between steps, and their methods."""
        self._step = DualSpeedStep(
            family=self.family,
            modes=plans,
            distill_weight=args.distill_weight,
            distill_temperature=args.distill_temperature,
            padding_free=self.packs_rows,
        )

    def _packs(self) -> bool:
        """Whether the sequences of a micro-batch are packed; if nobody said so, where it pays."""
        wanted = self.args.padding_free
        if wanted is not None:
            return wanted
        skips = any(mode.action == "skip" for mode in self.args.all_modes())
        # Packed, all rows would share the noise of one as long as them together.
        against = self.args.takes_stock_steps or skips or self.args.neftune_noise_alpha
        return self.engine == "ddp" and not against and packing_pays(self.family, self.args.device)

    def _speed_up(self) -> None:
        """Apply the options for speed."""
        args = self.args
        self.packs_rows = self._packs()
        if self.packs_rows:
            allow_packing(self.family)
        spare_casts(self.model)
        if args.linear_patches:
            use_linear_patches(self.family.vision_tower)
        else:
            warn_of_slow_patches(self.family.vision_tower)
        if self.engine != "ddp":
            if args.slow_micro_batch_size is not None:
                raise SaccadeError(
                    f"slow_micro_batch_size={args.slow_micro_batch_size}: FSDP and DeepSpeed count backward passes; "
                    "use a smaller per_device_train_batch_size with more gradient_accumulation_steps"
                )
            if args.torch_compile:
                raise SaccadeError("torch_compile=True is not known to work under FSDP and DeepSpeed: set it to false")
        if args.torch_compile:
            compile_layers(self.family, args.torch_compile_backend, args.torch_compile_mode)

    def _method(self, mode: ModeConfig) -> Method | None:
        """How a mode treats the visual tokens; None keeps all."""
        if mode.action == "keep":
            return None
        if mode.action == "skip":
            return Skipper(self.family, mode.skip_vision)
        return Pruner(mode.pruning, self.isolator if mode.isolator else None)

    # The loss of a micro-batch

    def mode_of(self, step: int) -> str:
        """The mode of optimizer step `step`, counted from 0."""
        return self.schedule.mode(step, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (self.skip is not None or self.args.fit_slow) and not self.model.training:
            # In the mode used for inference: the one on all tokens, if there is one.
            mode = self.meter.full or self.modes[-1].name
            count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
            mean = self._run_step(model, mode, inputs, count).cross_entropy
            # TRL reads `logits`, which there are none of: the sequences are not those of the stock forward.
            return (mean, CausalLMOutput(loss=mean)) if return_outputs else mean
        # The factor that turns means per rank, or per micro-batch, into terms of a global mean.
        is_whole = num_items_in_batch is not None or not self.model.training
        parts = 1 if is_whole else self.current_gradient_accumulation_steps
        share = 1 / (self.accelerator.num_processes * parts)
        if self.is_ordinary or return_outputs or not self.model.training:
            with warnings.catch_warnings():
                # TRL warns that it will stop returning logits; until then `predict` and `evaluate` return them.
                warnings.filterwarnings("ignore", "`return_outputs=True`", FutureWarning)
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.is_ordinary and self.model.training:
                self.guard.see(loss, inputs)
                tokens = inputs["attention_mask"].sum()
                output = StepOutput(loss, loss.detach(), None, tokens, tokens, None, len(inputs["labels"]))
                self.meter.add("slow", output, share)
            return loss
        mode = self.mode_of(self.state.global_step)
        normaliser = num_items_in_batch
        if normaliser is None:
            normaliser = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        # A batch whose samples are all masked has no labels and contributes zero.
        normaliser = torch.as_tensor(normaliser, device=inputs["input_ids"].device).clamp(min=1)
        # Where the normaliser counts every rank's tokens: the engines average gradients over ranks.
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        factor = self.accelerator.num_processes if averaged else 1
        in_parts, size = None, self.args.slow_micro_batch_size
        if size is not None and next(one for one in self.modes if one.name == mode).keeps_all:
            # The stock training step divides the loss by the number of parts.
            in_parts = InParts(size, self._backward_of_part, factor / parts)
        self.micro_batch += 1
        key = f"{self.args.seed} {self.state.global_step} {self.micro_batch} {self.args.process_index}"
        with self.guard.computing(inputs):
            row_seed = random.Random(key).getrandbits(60)
            output = self._run_step(model, mode, inputs, normaliser, row_seed, in_parts)
        self.guard.see(output.loss, inputs)
        self.meter.add(mode, output, share=1.0 if averaged else share)
        return output.loss * factor

    def _backward_of_part(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    def _run_step(
        self,
        model: nn.Module,
        mode: str,
        inputs: dict[str, Any],
        normaliser: Tensor,
        row_seed: int = 0,
        in_parts: InParts | None = None,
    ) -> StepOutput:
        """One micro-batch in `mode`, inside the forward of the model as the engine wrapped it."""

        for one, method in self._changing:
            step = (self.args.seed, self.state.global_step, self.state.max_steps)
            method.config = one.pruning_at(*step) if self.model.training else one.pruning

        def run(batch: dict[str, Any]) -> StepOutput:
            # The engine's own autocast wraps the original forward, which is replaced here.
            with self.accelerator.autocast():
                return self._step(mode, batch, normaliser, row_seed, in_parts)

        return redirect_forward(model, self.accelerator.unwrap_model(model), run, batch=inputs)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check(grad_norm)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Evaluations log `eval_loss`, and the end of the run `train_loss`.
        of_steps, training = "loss" in logs, self.model.training
        if of_steps:
            metrics = self.meter.read(self.sum_over_ranks)
            logs = {**logs, **{name: round(value, 6) for name, value in metrics.items()}}
            if self.bad_records:
                logs["bad_records"] = len(self.bad_records)
            # TRL's own count, which it also logs in evaluation, is of batches before they are shortened.
            self._total_train_tokens = int(metrics["num_tokens"])
        self._add_cache_hits(logs)
        # TRL goes by the model's mode, which an evaluation before the end of the epoch leaves at that.
        self.model.training = training or of_steps
        super().log(logs, start_time)
        self.model.training = training

    # Rows and batches

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.group_by == "none":
            return super()._get_train_sampler(train_dataset)
        usual = max(self.modes, key=lambda mode: self.schedule.shares[mode.name])
        counter = TokenCounter(
            self.processing_class,
            self.family.placeholder_id,
            usual.mean_pruning if usual.action == "drop" else PruningConfig(prune_ratio=0.0),
            self.isolator.length if self.isolator is not None and usual.isolator else 0,
            stop_ids(self.family.model.generation_config, self._tokenizer),
            self.args.conversation,
            self.args.sampling,
        )
        shortened = self.args.group_by == "shortened"
        lengths = estimate_lengths(dataset, counter, shortened, self.args.max_image_pixels)
        # A row may be unreadable for one rank alone, and all must draw the same batches.
        (lengths,) = broadcast_object_list([lengths])
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedSampler(lengths, step, seed)

    # Features of the frozen tower on disk

    def open_feature_cache(self) -> None:
        """Open the configured cache, once it is known which parts of the model train."""
        args = self.args
        if args.feature_cache is None:
            return
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if self.is_fsdp_enabled or zero3:
            raise SaccadeError(
                f"feature_cache={args.feature_cache!r}: FSDP and ZeRO-3 gather the vision tower's weights from all "
                "ranks, and would wait forever for ranks that read features from disk; use DDP or ZeRO-2, or leave "
                "feature_cache out"
            )
        self.feature_cache = FeatureCache(self.family, args.feature_cache, args.feature_cache_gib * 2**30)

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self.feature_cache is not None:
            stack.enter_context(self.feature_cache.serving())
        return stack

    def _add_cache_hits(self, logs: dict[str, float]) -> None:
        """Log the share of rows read from the cache since the last log, along with the loss."""
        # `loss`, `eval_loss`, or `eval_NAME_loss` with several sets; `train_loss` covers the whole run, at its end.
        names = (name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss"))
        name = next(names, None)
        if self.feature_cache is not None and name is not None:
            cache = self.feature_cache
            now = (cache.read_rows, cache.encoded_rows)
            window = torch.tensor([count - before for count, before in zip(now, self._rows_before, strict=True)])
            self._rows_before = now
            read, encoded = self.sum_over_ranks(window).tolist()
            if read + encoded:
                logs[f"{name.removesuffix('loss')}feature_cache_hits"] = round(read / (read + encoded), 6)

    # The optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with checks.as_bad_input():
            optimizer = super().create_optimizer(model)
        self._split_groups(optimizer)
        # A second `train` reuses the optimizer of the first, which accelerate has wrapped by then.
        stepped = getattr(optimizer, "optimizer", optimizer)
        if self.keeps_masters and (self.masters is None or self.masters.optimizer is not stepped):
            self.masters = Float32Masters(self.model, stepped)
        return optimizer

    def _added_modules(self) -> list[nn.Module]:
        """The isolator and the summary head, where there are any."""
        modules = (self.isolator, None if self.skip is None else self.skip.summary)
        return [module for module in modules if module is not None]

    def _complete(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the user's own optimizer the isolator and the summary head, which are not there when it is made."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        left = {name: value for name, value in trained.items() if id(value) not in stepped}
        own = {id(value) for module in self._added_modules() for value in module.parameters()}
        foreign = [name for name, value in left.items() if id(value) not in own]
        if foreign:
            raise SaccadeError(
                f"optimizers: {type(optimizer).__name__} does not step {len(foreign)} of {len(trained)} weights that "
                f"train, such as {', '.join(foreign[:3])}: leave it out, give optimizer_cls_and_kwargs instead, or "
                "freeze what is not to train"
            )
        divided = [name for name in ("projector_learning_rate", "vision_layer_decay") if getattr(self.args, name)]
        if self.lr_scheduler is not None and divided:
            raise SaccadeError(
                f"optimizers: {type(self.lr_scheduler).__name__} is made for the optimizer's parameter groups, and "
                f"{divided[0]} adds others: give None in its place, and set lr_scheduler_type"
            )
        # A scheduler that was made with the optimizer knows its groups: they join the first one.
        optimizer.param_groups[0]["params"].extend(left.values())

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Move parameters with their own learning rate to separate groups: of projector and isolator, of the tower."""
        rates: dict[int, float] = {}
        if self.args.projector_learning_rate is not None:
            own = [*self.family.projector.parameters(), *(() if self.isolator is None else self.isolator.parameters())]
            rates |= {id(parameter): self.args.projector_learning_rate for parameter in own}
        if self.args.vision_layer_decay is not None:
            base, decay = self.args.learning_rate, self.args.vision_layer_decay
            rates |= {id(parameter): base * decay**depth for parameter, depth in self._tower_depths()}
        for group in list(optimizer.param_groups):
            moved = defaultdict(list)
            for parameter in group["params"]:
                moved[rates.get(id(parameter))].append(parameter)
            group["params"] = moved.pop(None, [])
            for rate, parameters in moved.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def _tower_depths(self) -> list[tuple[nn.Parameter, int]]:
        depths = depths_below_features(self.family.vision_tower, self.family.vision_feature_layers)
        if depths is None:
            raise SaccadeError(
                f"vision_layer_decay={self.args.vision_layer_decay!r}: the layers of the vision tower of "
                f"model_type={self.family.model.config.model_type!r} are not known; leave it out"
            )
        return depths

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            # FSDP shards trainable weights in float32; its checkpoints keep those in separate files.
            state_dict = {name: value.to(self._dtypes.get(name, value.dtype)) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.masters is not None and self.args.should_save:
            self.masters.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"resume_from_checkpoint={checkpoint!r}: optimizer or scheduler cannot be read"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.masters is not None and checkpoint is not None:
            self.masters.load(checkpoint)

    # Weights, isolator, checkpoints

    def _check_trainable(self) -> None:
        if self.model is self.family.model:
            checks.check_language_model_trains(self.family, self.args)
        checks.check_model_trains(self.model, self._added_modules())
        if isinstance(self.train_dataset, Sized):
            checks.check_full_batch(self.args, len(self.train_dataset))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, processor, isolator, and how they were trained. All ranks must call it.

        Raises:
            OSError: if a file cannot be written, for example on a full disk.
        """
        with self.sigterm.saving():
            folder = Path(output_dir or self.args.output_dir)
            if self.args.should_save:
                # Until the new weights are complete they have no run file, and measurements of the old ones no longer
                # apply.
                outdated = () if self._has_not_gone_on(folder) else MEASURED
                for name in (RUN_FILE, *outdated):
                    (folder / name).unlink(missing_ok=True)
            with disk_errors(folder):
                super().save_model(output_dir, _internal_call)
            weight = None if self.isolator is None else gathered(self.isolator.weight)
            head = None if self.skip is None else self.skip.summary
            summary = {} if head is None else {name: gathered(value) for name, value in head.named_parameters()}
            counted = self.meter.so_far(self.sum_over_ranks)
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
                    self.isolator.save_pretrained(folder, metadata=state, weight=weight)
                if self.skip is not None:
                    self.skip.save_pretrained(folder, tensors=summary)
                drops = [mode for mode in self.modes if mode.action == "drop" and not mode.pruning.keeps_all]
                for mode in drops[:1]:
                    mode.pruning.replace(isolator=str(folder) if mode.isolator else None).save_pretrained(folder)
                facts = {"global_step": self.state.global_step, **counted, **self._base_weights}
                if self._weights_step is not None:
                    facts["weights_step"] = self._weights_step
                write_run_file(folder, state, self.run_id, **facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(f"resume_from_checkpoint={resume_from_checkpoint!r}: the weights cannot be loaded"):
            checkpoint = Path(resume_from_checkpoint)
            stock = self.model if model is None else model
            if isinstance(stock, PreTrainedModel) and not self.is_fsdp_enabled:
                own = {f"{ISOLATOR_NAME}.weight"}
                if self.skip is not None and self.skip.summary is not None:
                    own |= {f"{SUMMARY_NAME}.{name}" for name in self.skip.summary.state_dict()}
                load_weights_strictly(stock, checkpoint, ignored=own)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_own(checkpoint)
            before = read_run_file(checkpoint) or {}
            self.meter.tokens.update(before.get("tokens", {}))
            samples = before.get("samples", 0)
            self.meter.samples = samples if isinstance(samples, int) else 0

    def _load_own(self, checkpoint: str | Path) -> None:
        """Load the isolator and the summary head."""
        if self.isolator is not None:
            self._copy_isolator(ModeIsolator.from_pretrained(checkpoint))
        if self.skip is not None:
            self.skip.load_summary(checkpoint)

    def _load_best_model(self) -> None:
        best, tokens, samples = self.state.best_model_checkpoint, dict(self.meter.tokens), self.meter.samples
        check_files(best)
        if isinstance(self.model, PreTrainedModel) and self.engine == "ddp":
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()
            self._load_own(best)
        # The run went on after it.
        self.meter.tokens.update(tokens)
        self.meter.samples = samples
        self._weights_step = step_of(Path(best))

    def _stage_schedule(self) -> ModeSchedule:
        """The configured schedule; always the first mode if no parameter of the decoder layers trains."""
        trains = any(parameter.requires_grad for parameter in self.family.language_layers.parameters())
        if trains or self.args.is_ordinary:
            return self.args.mode_schedule()
        return ModeSchedule(self.args.seed, {mode.name: float(mode is self.modes[0]) for mode in self.modes})

    def _attach_isolator(self) -> ModeIsolator | None:
        if self.args.is_ordinary or not any(mode.isolator for mode in self.modes):
            return None
        width = self.family.model.config.get_text_config().hidden_size
        # In bf16 its entries are too coarse for updates at fine-tuning rates; sharding engines need a uniform dtype.
        dtype = torch.float32 if self.engine == "ddp" else self.family.model.dtype
        isolator = ModeIsolator(self.args.isolator_length, width, dtype)
        self.isolator = isolator.to(self.family.model.device)
        source, start = self.args.isolator_path, "random values"
        # An earlier training of this model object may have left its isolator.
        held = getattr(self.model, ISOLATOR_NAME, None)
        if source is None and held is not None and held.weight.shape == isolator.weight.shape:
            self._copy_isolator(held)
            # It may be attached to the stock model, around which adapters have been wrapped since.
            self.family.model._modules.pop(ISOLATOR_NAME, None)
            start = "the one of an earlier training of this model"
        elif source is None:
            source = self._find_beside(ISOLATOR_FILE)
            self._warn_of_adapters("mode isolator", source or start, "set isolator_path to their folder")
            # Adapters that are merged or unloaded leave it behind: it was attached to the model around them.
            ignored = self.family.model._keys_to_ignore_on_save or ()
            if held is None and f"{ISOLATOR_NAME}.weight" in ignored and not self._adapters_loaded:
                logger.warning(
                    "model was trained with a mode isolator and has lost it, as in `merge_and_unload()`: the mode "
                    "isolator starts from %s; to go on with the trained one, set isolator_path to its run's folder",
                    source or start,
                )
        if source is not None:
            self._copy_isolator(ModeIsolator.from_pretrained(source), source)
        logger.info("the mode isolator starts from %s", source or start)
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
        # What text sees and which layers skip are properties of the model, the same in all modes.
        skip = apply_skip_vision(self.model, skipping[0])
        if skip.summary is not None:
            if self.engine != "ddp":
                skip.summary.to(self.family.model.dtype)
            source = self._find_beside(SUMMARY_FILE)
            if source is not None:
                skip.load_summary(source)
            start = source or "random values"
            self._warn_of_adapters("summary head", start, "call `trainer.skip.load_summary(folder)` before training")
            logger.info("the summary head starts from %s", start)
        return skip

    def _find_beside(self, name: str) -> str | None:
        """The file of that name beside the weights that the stock model was loaded from."""
        folder = self.family.model.config._name_or_path
        found = find_companion(folder, name) if folder else None
        return None if found is None else str(found)

    def _warn_of_adapters(self, part: str, start: str, fix: str) -> None:
        """PEFT does not tell where adapters were loaded from, so what was saved beside them is not found."""
        if self._adapters_loaded:
            logger.warning(
                "model is a PeftModel, which does not know the folder of its adapters: the %s starts from %s; if they "
                "were trained with one, %s",
                *(part, start, fix),
            )

    def _copy_isolator(self, loaded: ModeIsolator, source: str = "the checkpoint") -> None:
        if loaded.weight.shape != self.isolator.weight.shape:
            raise SaccadeError(
                f"isolator_length={self.isolator.length}: the isolator from {source} has shape "
                f"{tuple(loaded.weight.shape)}, this run needs {tuple(self.isolator.weight.shape)}; "
                "set isolator_length to fit, or isolator_path to another one"
            )
        copy_whole(loaded.weight, self.isolator.weight)


def have_learned(model: PeftModel) -> bool:
    """Whether LoRA adapters are other than new ones, whose second matrices are zero."""
    second = (value for name, value in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name)
    return any(bool(value.any()) for value in second)


def freeze_parts(family: Family, args: DualSpeedConfig) -> None:
    """Freeze the parts of a model that the options name."""
    parts = (
        (args.freeze_vision_tower, family.vision_tower),
        (args.freeze_projector, family.projector),
        (args.freeze_language_model, family.language_model),
        (args.freeze_language_model, family.model.get_output_embeddings()),
    )
    for frozen, module in parts:
        if frozen:
            module.requires_grad_(False)


@contextmanager
def _withheld(args: DualSpeedConfig) -> Iterator[None]:
    """Hide options that this trainer implements itself from TRL.

    TRL refuses `padding_free` with images: its collator would join rows before their images are encoded. Accelerate
    would compile the whole model, whose forward is redirected. For `assistant_only_loss` TRL requires markers in the
    chat template, which our collator does not need.
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
