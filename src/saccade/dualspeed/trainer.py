"""`DualSpeedTrainer`: TRL's `SFTTrainer` with fast and slow steps."""

import logging
import math
import random
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_callback import DefaultFlowCallback, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, has_length
from trl import SFTTrainer

from saccade.companions import copy_whole, find_companion
from saccade.data.lengths import TokenCounter, estimate_lengths
from saccade.data.turns import is_plain_text
from saccade.dualspeed import checks
from saccade.dualspeed.bad_records import BadRecordLog
from saccade.dualspeed.callbacks import NonFiniteGuard, SigtermCheckpoint, surviving
from saccade.dualspeed.casts import spare_casts
from saccade.dualspeed.checkpoint import (
    STATE_FILE,
    BestOfRun,
    adapter_options,
    check_same_run,
    find_best,
    load_weights_strictly,
    publish_checkpoint,
    remove_old_checkpoints,
    remove_other_kind,
    resolve_resume,
    step_of,
    unpublished,
)
from saccade.dualspeed.collator import BAD_RECORDS, DualSpeedCollator
from saccade.dualspeed.compiling import compile_layers
from saccade.dualspeed.config import DualSpeedConfig
from saccade.dualspeed.engines import BLANK_ROW, DummyImageCollator, gathered, layer_classes, redirect_forward
from saccade.dualspeed.folder import (
    MEASURED,
    PARTIAL_DIR,
    RUN_FILE,
    agreed,
    check_not_removed,
    claim,
    hold,
    new_id,
    read_run_file,
    write_run_file,
)
from saccade.dualspeed.identity import identify_model, identify_processor, identify_rows
from saccade.dualspeed.labels import check_turns, stop_ids
from saccade.dualspeed.loss import learnable_labels
from saccade.dualspeed.masters import Float32Masters, wants_masters
from saccade.dualspeed.metrics import ModeMeter, StepClock
from saccade.dualspeed.modes import ModeConfig, ModeSchedule
from saccade.dualspeed.packing import allow_packing, packing_pays
from saccade.dualspeed.parts import InParts
from saccade.dualspeed.pushes import CheckpointPushes
from saccade.dualspeed.sampler import EpochStart, GroupedSampler, WholeBatches
from saccade.dualspeed.step import DualSpeedStep, ModePlan, StepOutput
from saccade.dualspeed.weights import BASE_WEIGHTS, identify_weights, load_by_name
from saccade.errors import SaccadeError, kind_of
from saccade.families import Family, family_class, get_family, stock_model, use_released_names
from saccade.families.cache import FeatureCache
from saccade.families.fitting import check_processor
from saccade.families.linear_patches import use_linear_patches, warn_of_slow_patches
from saccade.families.padding import check_aspect_ratio, pad_to_square
from saccade.families.tower import depths_below_features
from saccade.files import check_entries, disk_errors, reading
from saccade.interfaces import check_methods
from saccade.model_files import ADAPTER_FILE, check_files
from saccade.pruning import ISOLATOR_FILE, Method, ModeIsolator, Pruner
from saccade.reducers import PruningConfig
from saccade.skip_vision import SUMMARY_FILE, SUMMARY_NAME, Skipper, SkipVision, apply_skip_vision
from saccade.tokens import IGNORE_INDEX

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
ISOLATOR_NAME = "mode_isolator"
REPLACED = (
    *("_finalize_training", "_get_grad_norm", "_get_train_sampler", "_init_training_state", "_load_best_model"),
    *(
        "_load_callback_state",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save",
    ),
    *("_load_optimizer_and_scheduler", "_save_checkpoint", "_save_optimizer_and_scheduler", "compute_loss", "log"),
    *("compute_loss_context_manager", "create_optimizer", "evaluation_loop", "get_batch_samples", "prediction_step"),
    *("get_eval_dataloader", "get_test_dataloader", "get_train_dataloader", "save_model", "train"),
)
"""Methods of the stock trainer that are overridden here: if one is renamed, the override is never called."""
check_methods(SFTTrainer, REPLACED, "transformers")


class DualSpeedTrainer(SFTTrainer):
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
    args: DualSpeedConfig
    feature_cache: FeatureCache | None = None
    masters: Float32Masters | None = None
    """The float32 masters, once training has begun, if the trainer keeps them itself."""
    _evaluated: Tensor | None = None
    """Sums of the current evaluation on this rank: losses of rows, number of rows, number of bad records."""
    _train_loader: DataLoader | None = None
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
        self.run_id: str | None = None
        self._resumed_at: int | None = None
        self._resumed_from: str | None = None
        self._weights_step: int | None = None  # where the best model was loaded from
        self.best = BestOfRun()
        self.add_callback(self.best)
        self.pushes = CheckpointPushes(self)
        self.add_callback(self.pushes)
        self._identity: dict[str, Any] | None = None
        self._base_weights: dict[str, str] = {}
        self.sigterm, self.guard = SigtermCheckpoint(self), NonFiniteGuard(self)
        self.add_callback(self.sigterm)
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

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks. Every rank must call it."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        """The stock loader, with a collator that replaces bad records and lists them in the batch."""
        rows = self.train_dataset
        with self._collating(rows):
            if getattr(rows, "num_shards", 1) < self.accelerator.num_processes:
                # There is not a part for each rank: all of them read all of it.
                self.train_dataset = self._in_whole_batches(rows, self.args.train_batch_size)
            try:
                self._train_loader = super().get_train_dataloader()
            finally:
                self.train_dataset = rows
        return self._train_loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The stock loader, with a collator that lists bad records and does not count their replacements."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        size = self.args.eval_batch_size
        with self._collating(rows, learn_stand_ins=False):
            # For a dataset given by name, the stock loader may be reused in the next evaluation.
            given = eval_dataset if has_length(rows) else self._in_whole_batches(rows, size)
            return surviving(super().get_eval_dataloader(given))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """The same for `predict`, where replacements of bad records have no labels, only -100."""
        with self._collating(test_dataset, learn_stand_ins=False):
            rows = self._in_whole_batches(test_dataset, self.args.eval_batch_size)
            return surviving(super().get_test_dataloader(rows))

    def _in_whole_batches(self, rows: Any, size: int) -> Any:
        """A stream, filled up to whole batches on all ranks; other rows, which accelerate splits evenly, unchanged.

        Args:
            size: rows of a batch on each rank.
        """
        if has_length(rows) or self.accelerator.num_processes == 1:
            return rows
        return WholeBatches(rows, size * self.accelerator.num_processes)

    @contextmanager
    def _collating(self, rows: Any, **options: Any) -> Iterator[None]:
        strict, self.data_collator = self.data_collator, self._lenient(rows, **options)
        try:
            yield
        finally:
            self.data_collator = strict

    def end_workers(self) -> None:
        """End the data workers of training; persistent ones would otherwise keep waiting for work.

        The garbage collector would close their queues before telling them to end, and then wait ten seconds for them.
        """
        if self._train_loader is not None:
            self._base_loader()._iterator = None
        self._train_loader = None

    def training_collator(self) -> Any:
        """The collator as training uses it: bad records are replaced, up to `max_bad_records`."""
        return self._lenient(self.train_dataset)

    def _lenient(self, rows: Any, **options: Any) -> Any:
        """The collator with bad records replaced by others of `rows`, or of the batch if rows have no index."""
        outer = self.data_collator
        collate = outer.collate if isinstance(outer, DummyImageCollator) else outer
        if not isinstance(collate, DualSpeedCollator):
            return outer
        rows = rows if isinstance(rows, Dataset) else None
        collate = replace(collate, max_bad_records=self.args.max_bad_records, rows=rows, **options)
        return replace(outer, collate=collate) if isinstance(outer, DummyImageCollator) else collate

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

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of the next optimizer step. Every rank must call it.

        Raises:
            SaccadeError: on all ranks, if there are too many bad records.
        """
        batches = []
        for batch in islice(epoch_iterator, num_batches):
            self._ignore_unlearned(batch)
            batches.append(batch)
        if not has_length(self.train_dataset):
            batches = self._fill_up(batches, num_batches)
        if batches:
            for batch in batches:
                batch.pop(BLANK_ROW, None)
            found = [bad for batch in batches for bad in batch.pop(BAD_RECORDS, ())]
            self._note_bad_records(found, given_up=not all(batches))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _fill_up(self, batches: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        """Bring the last step of a stream's epoch to `number` micro-batches on every rank.

        An earlier batch, without labels, takes the place of one that is missing. A rank that ran out of rows would
        otherwise begin the next epoch alone, and the stock loop adds the gradients of too few to the next step.
        """
        device, counts = self.accelerator.device, [len(batches)]
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(torch.tensor(counts, device=device)).tolist()
        if max(counts) == 0 or min(counts) == number:
            return batches
        first = batches[0] if batches else next(iter(self._base_loader()), None)
        if min(counts) == 0:
            empty = self.accelerator.gather(torch.tensor([first is None], device=device)).tolist()
            if any(empty):
                raise SaccadeError(
                    f"the training stream has no rows for rank {empty.index(True)}: it has fewer rows than the "
                    f"{len(empty)} processes and their data workers; use fewer of them"
                )
        stands_in = {name: value for name, value in first.items() if name != BAD_RECORDS}
        if "labels" in stands_in:
            stands_in["labels"] = torch.full_like(stands_in["labels"], IGNORE_INDEX)
        return batches + [dict(stands_in) for _ in range(number - len(batches))]

    def _base_loader(self) -> DataLoader | None:
        """The loader that accelerate's wraps."""
        return getattr(self._train_loader, "base_dataloader", self._train_loader)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stock step, whose logits and labels are of the rows of the dataset. Every rank must call it.

        Raises:
            SaccadeError: on all ranks, if there are too many bad records.
        """
        found, blank_row = inputs.pop(BAD_RECORDS, ()), inputs.pop(BLANK_ROW, False)
        self._note_bad_records(found, given_up=not inputs)
        self._ignore_unlearned(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and "labels" in inputs:
            counted = (inputs["labels"][:, 1:] != IGNORE_INDEX).any(dim=1).sum().float().to(loss.device)
            step = torch.stack([loss.detach().float() * counted, counted, torch.full_like(counted, len(found))])
            self._evaluated = step if self._evaluated is None else self._evaluated + step
        if blank_row:
            inputs["input_ids"] = inputs["input_ids"][:-1]  # which metrics may be given too
            logits, labels = (None if rows is None else rows[:-1] for rows in (logits, labels))
        return loss, logits, labels

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """The stock loop. With bad records, and for streams, the loss is the mean over the rows that count."""
        self._evaluated = None
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if self._evaluated is not None:
            # The stock loss averages over batches, but a batch without a usable row has none, and the last batch of a
            # stream may be shorter than the others.
            total, counted, bad = self.sum_over_ranks(self._evaluated).tolist()
            if bad or not has_length(getattr(dataloader, "dataset", None)):
                output.metrics[f"{metric_key_prefix}_loss"] = total / max(counted, 1)
        return output

    def _ignore_unlearned(self, batch: dict[str, Any]) -> None:
        """Mask the labels that do not count, before anything counts them. A collator of the user's own, TRL's for
        instance, labels image tokens too."""
        if "labels" in batch:
            placeholder = self.family.placeholder(batch["input_ids"])
            batch["labels"] = learnable_labels(batch["labels"], placeholder, batch.get("attention_mask"))
            self._ignore_repeated_rows(batch)

    def _ignore_repeated_rows(self, batch: dict[str, Any]) -> None:
        """With several ranks, mask the labels of rows that merely pad the last batch of an epoch.

        Accelerate repeats rows there so that every rank has a batch of the same size; a single process would run a
        shorter batch, so without the mask these rows would count twice. They still go through the model, since engines
        need the same calls on all ranks.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader:
            return
        loader = state.active_dataloader
        shard = loader.batch_sampler
        if isinstance(shard, SkipBatchSampler):  # of a resumed epoch; accelerate counts no remainder there
            shard = shard.batch_sampler
        repeats = isinstance(shard, BatchSamplerShard) and shard.even_batches and not shard.drop_last
        if not repeats or shard.batch_size is None:
            return
        size = shard.batch_size // ranks if shard.split_batches else shard.batch_size
        real = len(loader.dataset) % (size * ranks)
        if real:
            batch["labels"][max(real - self.accelerator.process_index * size, 0) :] = IGNORE_INDEX

    def _note_bad_records(self, found: list[dict[str, Any]], given_up: bool) -> None:
        """Record the bad records of all ranks, and stop all of them if there are too many or one has no batch."""
        new = self.bad_records.unknown(found)
        if self.accelerator.num_processes > 1:
            # Two numbers first: the lists are gathered only if they are not all empty.
            count, given_up = self.sum_over_ranks(torch.tensor([len(new), given_up])).tolist()
            new = gather_object(new) if count else []
        if new:
            self.bad_records.add(new)
            if self.args.should_save:
                self.bad_records.write()
        if new or given_up:
            self.bad_records.check()
        if given_up:
            raise SaccadeError(
                f"no record of a batch can be used, and there is no replacement: see {self.bad_records.path}"
            )

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

    @property
    def engine(self) -> str:
        """The distributed engine: "ddp" (also for one process), "fsdp" or "deepspeed"."""
        if self.is_fsdp_enabled:
            return "fsdp"
        return "deepspeed" if self.is_deepspeed_enabled else "ddp"

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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete checkpoint of the run that
                `output_dir` belongs to.

        On SIGTERM it saves a checkpoint to resume from, whatever `save_strategy` and `save_only_model` are, and
        returns without another evaluation; `sigterm.stopped` is then true. On Ctrl-C it saves one too, and raises
        `Interrupted`, a `KeyboardInterrupt`.

        Raises:
            SaccadeError: if `output_dir` contains files of another run and `args.overwrite` is not set, or another run
                is writing there; if there is no complete checkpoint, or it was trained with other options, rows or
                another model; if a loss is not finite, or a process that prepares batches dies.
            OSError: if a checkpoint cannot be written, for example on a full disk; the previous one is kept.
        """
        if self.model is self.family.model:
            checks.check_language_model_trains(self.family, self.args)
        checks.check_model_trains(self.model, self._added_modules())
        if isinstance(self.train_dataset, Sized):
            checks.check_full_batch(self.args, len(self.train_dataset))
        with ExitStack() as held:
            agreed(self.args, lambda: held.enter_context(hold(self.args)))
            return self._train_in_its_folder(resume_from_checkpoint, **kwargs)

    def _check_not_overwritten(self) -> None:
        """Refuse to remove the folder that the model, its adapters or their base were loaded from."""
        bases = [config.base_model_name_or_path for config in getattr(self.model, "peft_config", {}).values()]
        for path in (self.family.model.name_or_path, *bases):
            check_not_removed(path, self.args.output_dir, "model")
        check_not_removed(self.args.isolator_path, self.args.output_dir, "isolator_path")
        if self._adapters_loaded:
            # PEFT does not say from where.
            out = Path(self.args.output_dir)
            for path in (*out.glob(ADAPTER_FILE), *out.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{ADAPTER_FILE}")):
                raise SaccadeError(
                    f"overwrite=true would remove adapters, which the model may have been loaded from: {path}; name "
                    "another output_dir, or remove them yourself if it was not"
                )

    def _train_in_its_folder(self, resume: str | bool | None, **kwargs: Any):
        args = self.args
        checkpoint = agreed(args, lambda: resolve_resume(resume, args.output_dir))
        found = None if checkpoint is None else agreed(args, lambda: (read_run_file(checkpoint) or {}).get("run_id"))
        self.run_id = agreed(args, lambda: found or new_id())
        self._identity = agreed(args, self._identify)
        self._base_weights = agreed(args, self._identify_base)
        if checkpoint is not None:
            check_same_run(checkpoint, self._resume_state())
        if checkpoint is None and args.overwrite:
            agreed(args, self._check_not_overwritten)
        agreed(args, lambda: claim(args.output_dir, self.run_id, checkpoint, args.overwrite))
        self._resumed_at = self._weights_step = None
        self._resumed_from = None if checkpoint is None else str(checkpoint)
        if checkpoint is None:
            self.best.path = None
            if args.should_save:
                self.bad_records.path.unlink(missing_ok=True)
        else:
            self.bad_records.read()
            state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
            self._resumed_at = state.global_step
            best = find_best(state.best_model_checkpoint, checkpoint.parent, Path(args.output_dir))
            if best is None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
                raise SaccadeError(
                    f"best_model_checkpoint={state.best_model_checkpoint!r} in {checkpoint / STATE_FILE} is not a "
                    f"checkpoint of {checkpoint.parent}: put it there, or set load_best_model_at_end to false"
                )
            self.best.path = best
        try:
            with self.sigterm.training():
                return super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
        except Exception as error:
            # Compared by name, so that `pickle` need not be imported.
            if type(error).__name__ != "UnpicklingError":
                raise
            raise SaccadeError(
                f"resume_from_checkpoint={str(checkpoint)!r} contains something other than tensors and plain values, "
                "which could run code: resume from your own checkpoint"
            ) from error
        finally:
            self.end_workers()

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

    def _has_not_gone_on(self, folder: Path) -> bool:
        """Whether the model is the one that `folder` holds: a finished run was resumed, and had no step left."""
        if self._resumed_at is None or self.state.global_step != self._resumed_at:
            return False
        try:
            found = read_run_file(folder) or {}
        except SaccadeError:
            return False
        return (found.get("run_id"), found.get("global_step")) == (self.run_id, self._resumed_at)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir, only_model = Path(self.args.output_dir), self.args.save_only_model
        partial = run_dir / PARTIAL_DIR
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        # A run that was stopped is to be resumed, for which weights alone do not suffice.
        self.args.save_only_model = only_model and not self.sigterm.stopped
        try:
            with disk_errors(run_dir):
                super()._save_checkpoint(model, trial)
        except BaseException:
            # Removing the partial checkpoint frees the space that the next attempt needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self.args.output_dir, self.args.save_only_model = str(run_dir), only_model
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).is_relative_to(partial):
            self.state.best_model_checkpoint = str(run_dir / Path(best).relative_to(partial))
        if self.args.should_save:
            folder = partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            try:
                if best != self.state.best_model_checkpoint:
                    self.state.save_to_json(str(folder / "trainer_state.json"))
                card = partial / "README.md"
                if self.args.push_to_hub and card.is_file():
                    card.replace(run_dir / card.name)
                written = publish_checkpoint(partial, run_dir)
            except BaseException:
                if not unpublished(run_dir):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            if self.args.push_to_hub:
                with disk_errors(run_dir):
                    self._push_from_checkpoint(str(written))
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            remove_old_checkpoints(written, limit, best, self.pushes.reading())
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **options: Any) -> None:
        """The stock loop, after the evaluation that the run left out when it was stopped."""
        made = self._make_up_evaluation(options["trial"], options["ignore_keys_for_eval"])
        if made and self.control.should_training_stop:
            return
        super()._run_epoch(**options)

    def _make_up_evaluation(self, trial: Any, ignore_keys: list[str] | None = None) -> bool:
        """Make the evaluation that was due after the step that the run is resumed from, if it is not in its log.

        Returns:
            Whether it was made.
        """
        if self._resumed_at != self.state.global_step or not self._owes_evaluation():
            return False
        metrics = self._evaluate(trial, ignore_keys)
        if self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self._resumed_from
        return True

    def _owes_evaluation(self) -> bool:
        """Whether an evaluation was due after the current step, and is not in the log."""
        state, due, flow = self.state, TrainerControl(), DefaultFlowCallback()
        flow.on_step_end(self.args, state, due)
        if float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps:
            flow.on_epoch_end(self.args, state, due)
        seen = (entry for entry in state.log_history if entry.get("step") == state.global_step)
        return due.should_evaluate and not any(name.startswith("eval_") for entry in seen for name in entry)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """The stock end of training. A run that was stopped has not come to it: its model and checkpoints stay."""
        best = self.state.best_model_checkpoint
        if self.sigterm.stopped:
            # The stock trainer loads it, and with save_total_limit=1 removes all others.
            self.state.best_model_checkpoint = None
        else:
            # If the run was stopped in its last step, no epoch has been run since.
            self._make_up_evaluation(trial)
            best = self.state.best_model_checkpoint
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self.state.best_model_checkpoint = best
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        checkpoint = Path(checkpoint_folder)
        # Called by the stock `_save_checkpoint` too, while the checkpoint is in a folder that will be gone by the time
        # that an upload reads it.
        if checkpoint.parent.name != PARTIAL_DIR:
            with self.pushes.of(checkpoint):
                super()._push_from_checkpoint(checkpoint_folder)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """The epoch to begin with, and how many of its micro-batches a resumed run skips."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return start
        if self.state.global_step >= max_steps:
            # The stock loop looks only after a step, and would train one too many.
            return num_train_epochs, 0
        if has_length(self.train_dataset):
            return start
        # The stock loop takes all steps for one epoch of a stream, and counts micro-batches as a share of them.
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
        epoch = max(math.ceil(saved.epoch) - 1, 0)
        steps = 0.0 if self.args.ignore_data_skip else (saved.epoch - epoch) * saved.max_steps
        return epoch, round(steps * self.args.gradient_accumulation_steps)

    def _load_callback_state(self) -> None:
        """Let callbacks go on counting where the checkpoint's did: the evaluations without a better one, for instance.

        With `restore_callback_states_from_checkpoint` the stock trainer replaces the callbacks, and the options that
        they were made with, by those of the checkpoint.
        """
        super()._load_callback_state()
        saved, kinds = self.state.stateful_callbacks, defaultdict(list)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                kinds[type(callback).__name__].append(callback)
        for name, callbacks in kinds.items():
            # Saving fails without an entry, as of a callback that the run did not have before. Of several callbacks of
            # one kind, each save adds the states to a list.
            found = saved.setdefault(name, callbacks[0].state() if len(callbacks) == 1 else [])
            states = found[-len(callbacks) :] if isinstance(found, list) else [found]
            for callback, state in zip(callbacks, states, strict=False):
                held = callback.state().get("attributes", {})
                for attribute, value in state.get("attributes", {}).items():
                    if attribute in held:
                        setattr(callback, attribute, value)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"resume_from_checkpoint={checkpoint!r}: the random state cannot be read"):
            super()._load_rng_state(checkpoint)

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

    def _resume_state(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        args, engine = self.args, self.engine
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # DeepSpeed saves the optimizer as one shard per rank, which another number of ranks cannot read.
        ranks = {"num_processes": args.world_size} if engine == "deepspeed" else {}
        masters = {"float32_masters": self.keeps_masters}
        state = {**args.resume_state(), **masters, "global_batch_size": batch, "engine": engine, **ranks}
        return {**state, "adapters": adapter_options(self.model), **(self._identity or {})}

    def _identify(self) -> dict[str, Any]:
        """What the run is trained on and from."""
        rows = identify_rows(self.train_dataset)
        if rows["rows"] is None:
            # Each worker of each process reads its own part of a stream.
            rows |= {"readers": self.args.world_size * max(1, self.args.dataloader_num_workers)}
        return {
            "data": rows,
            "model": identify_model(self.model, self.family.model.config, self.model is not self.family.model),
            "processor": identify_processor(self.processing_class),
        }

    def _identify_base(self) -> dict[str, str]:
        """The weights that adapters belong to, for the run file: what PEFT writes is only where they were."""
        places = {config.base_model_name_or_path for config in getattr(self.model, "peft_config", {}).values()}
        found = [identify_weights(place) for place in places if place]
        return {BASE_WEIGHTS: found[0]} if len(found) == 1 and found[0] is not None else {}

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
