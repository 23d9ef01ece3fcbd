"""Every option of a DualSpeed run, on top of TRL's `SFTConfig`."""

import logging
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib.util import find_spec
from os import PathLike
from typing import Any, ClassVar, get_origin

import torch
from transformers import SchedulerType, get_scheduler
from trl import SFTConfig

from saccade.data.plain import CONVERSATIONS
from saccade.dualspeed.compiling import check_compiling
from saccade.dualspeed.modes import ModeConfig, ModeSchedule, fast_and_slow, listed
from saccade.errors import SaccadeError, needs_package
from saccade.families.cache import check_needs
from saccade.families.padding import ASPECT_RATIOS
from saccade.images import LARGEST_MAX_PIXELS, MAX_PIXELS
from saccade.presets import with_preset
from saccade.reducers import PruningConfig
from saccade.reducers.config import PRUNING_OPTIONS
from saccade.skip_vision import SkipVisionConfig
from saccade.values import check_choice, check_finite, coerce
from saccade.videos import VIDEO_FRAMES, Sampling

logger = logging.getLogger(__name__)

GROUP_BY = ("none", "shortened", "full")


class NoGPUError(SaccadeError):
    """An option needs a GPU, and this machine has none."""


LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"), 0),
    **dict.fromkeys(("num_train_epochs", "dataloader_num_workers", "seed", "data_seed", "neftune_noise_alpha"), 0),
    **dict.fromkeys(("isolator_length", "distill_weight", "max_bad_records"), 0),
    **dict.fromkeys(("max_length", "slow_micro_batch_size"), 1),
}
"""Smallest values. Those of transformers' options it checks itself only after the model is loaded, or never."""

# Options that may differ between a resumed run and the original one. All others must be the same, including those that
# a later version adds: with another value the loss curve would not continue.
FREE_TO_CHANGE = frozenset(
    (
        # Where files are, what is saved, and what is reported.
        *("output_dir", "overwrite", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "run_name"),
        *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
        *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "logging_strategy", "logging_steps", "logging_first_step"),
        *("log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "project", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "debug", "skip_memory_metrics", "max_bad_records"),
        # How to evaluate, and which checkpoint is best. When to evaluate is not free: evaluation draws random numbers.
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
        *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_packing"),
        # Other ways to compute the same numbers, up to rounding.
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend"),
        *("torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "torch_empty_cache_steps"),
        *("padding_free", "slow_micro_batch_size", "feature_cache", "feature_cache_gib", "use_cpu"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
        # Only the kind of engine is compared.
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "local_rank"),
        # Compared by their effect: the global batch, the length of the run, the model, the processor.
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
        "max_tokens_per_batch",
        *("model_init_kwargs", "trust_remote_code", "chat_template_path", "isolator_path"),
    )
)


@dataclass
class DualSpeedConfig(SFTConfig):
    r"""
    Options of a [`DualSpeedTrainer`]: those of [`~trl.SFTConfig`], and the ones below.

    `slow_probability=0, isolator_length=0` trains on pruned tokens only. `prune_ratio=0, slow_probability=1,
    distill_weight=0` is ordinary supervised fine-tuning; with `skip_vision` in addition it is Skip-Vision's.

    Args:
        reducer (`str`, *optional*, defaults to `"divprune"`):
            Method that chooses the visual tokens of fast steps; `saccade reducers` lists them.
        reducer_options (`dict`, *optional*):
            Keyword options of the reducer.
        prune_ratio (`float`, *optional*):
            Share of visual tokens that fast steps drop, in [0, 1). The paper's p. Defaults to 0.9, or to None if
            `keep_tokens` is given; the two exclude each other.
        keep_tokens (`int`, *optional*):
            Number of visual tokens that fast steps keep, instead of the ratio.
        budget (`str`, *optional*, defaults to `"crop"`):
            What the ratio or the number applies to: a `"crop"`, an `"image"` or a `"sample"`, see [`PruningConfig`].
        adaptive (`bool`, *optional*, defaults to `False`):
            Distribute the tokens of a micro-batch by how varied its images are, with the same total. Our addition, not
            the paper's.
        fit_length (`int`, *optional*):
            Maximum number of tokens of a row in fast steps, see [`PruningConfig`]. `max_length` is then ignored, and a
            row that cannot fit with one token per image is a bad record. Our addition, not the paper's.
        fit_slow (`bool`, *optional*, defaults to `False`):
            With `fit_length`: it also applies to modes on all tokens, and to evaluation during training.
        max_tokens_per_batch (`int`, *optional*):
            Maximum number of tokens that the language model runs on at a time, including padding, in every mode: each
            row of a micro-batch gets an equal share of them as its `fit_length`, or the given `fit_length` if that is
            less, and `fit_slow` is set.
        patch_tolerance (`float`, *optional*):
            In fast steps, drop before the vision tower what a predictor reproduces within this, see [`PruningConfig`].
            Passes on all tokens need whole images; where one learns from fast steps, the tower sees them too. Our
            addition, not the paper's.
        newlines (`str`, *optional*, defaults to `"keep"`):
            `"keep"` keeps the newline tokens of anyres images, which count towards the budget. `"drop"` drops them in
            fast steps.
        slow_probability (`float`, *optional*, defaults to `0.1`):
            Share of slow steps, on all tokens, in [0, 1]. The paper's r. A stage that trains no parameter of the
            language model is always fast.
        schedule (`str`, *optional*, defaults to `"bernoulli"`):
            `"bernoulli"` draws the mode of each step, as published. `"stratified"` spreads the slow steps evenly.
            `"sequential"` puts them at the end. The last is our addition, not the paper's.
        ratio_schedule (`str`, *optional*, defaults to `"constant"`):
            How the ratio of fast steps changes. `"linear"`: from `prune_ratio_start` in the first step to
            `prune_ratio` in the last. `"random"`: drawn in each step, uniformly between the two. Inference prunes by
            `prune_ratio`. Our addition, not the paper's.
        prune_ratio_start (`float`, *optional*):
            The other end of such a ratio, in [0, 1).
        modes (`list` of [`ModeConfig`], *optional*):
            More than two speeds, replacing fast and slow. In a recipe, each is a mapping, with the options of pruning
            beside the mode's own fields; what it leaves out is taken from the options here. A stage that trains no
            parameter of the language model is always in the first mode.
        skip_vision (`dict` or `str`, *optional*):
            Options of [`SkipVisionConfig`], or the name of a published budget, which may also be given as the option
            `preset`. With the options of ordinary fine-tuning, every step skips; otherwise `skip_mode` says which mode
            does, and the reducer chooses the retained tokens.
        skip_mode (`str`, *optional*, defaults to `"fast"`):
            With `skip_vision`: the mode, `"fast"` or `"slow"`, in which tokens that are not retained skip the
            feed-forward networks, instead of being dropped (fast) or running through them (slow).
        isolator_length (`int`, *optional*, defaults to `4`):
            Rows of the mode isolator before each image in fast steps, the paper's l; 0 switches it off.
        isolator_path (`str`, *optional*):
            Isolator to start from. Defaults to the one next to the model's weights, if there is one. Name it for a
            `PeftModel`, which does not know the folder of its adapters.
        distill_weight (`float`, *optional*, defaults to `1.0`):
            Weight of KL(fast || slow) in slow steps, the paper's lambda; 0 switches it off.
        distill_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both distributions in the KL, the paper's tau.
        positions (`str`, *optional*, defaults to `"compact"`):
            `"compact"` renumbers the shortened sequence, as published. With `"original"`, kept tokens keep the
            position that they have in the full sequence.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector and the isolator. Defaults to that of the other parameters.
        vision_layer_decay (`float`, *optional*):
            Layer-wise learning rates of a trained vision tower: `learning_rate` times this to the power of a layer's
            distance from the features, 1 for the layer that yields them, and one more for each before it and for the
            embeddings. In (0, 1]; Skip-Vision's largest run has 0.9. By default all have `learning_rate`.
        float32_masters (`bool`, *optional*):
            Keep float32 copies of weights that are trained in half precision, and let the optimizer update those: at
            fine-tuning learning rates, updates are too small for bfloat16. Defaults to true whenever such weights are
            trained. FSDP with `bf16` and DeepSpeed have their own. False halves the memory of optimizer states, but
            loses small updates.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Train no parameter of the vision tower.
        freeze_projector (`bool`, *optional*, defaults to `False`):
            Train no parameter of the projector.
        freeze_language_model (`bool`, *optional*, defaults to `False`):
            Train no parameter of the language model and its head: stage one of the paper.
        assistant_only_loss (`bool`, *optional*):
            Compute the loss on the assistant's turns only. Defaults to true for datasets with a `messages` column.
        conversation (`str`, *optional*, defaults to `"chat"`):
            `"plain"` trains on image, caption and line break, without roles or an instruction, as in LLaVA's stage
            one: the user's text is left out, and the loss covers the caption and the line break. `"chat"` trains on
            the model's chat format.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest full sequence. Text beyond it is truncated; a sample that would lose image tokens, or every answer,
            is a bad record. Ignored with `fit_length`.
        group_by (`str`, *optional*, defaults to `"none"`):
            `"shortened"` batches samples of similar length after pruning, `"full"` of similar full length, `"none"` as
            they are drawn.
        padding_free (`bool`, *optional*):
            Pack the sequences of a micro-batch into one without padding; attention stays within each sequence. Uses
            variable-length attention on a GPU in half precision, and one sequence at a time elsewhere. For `"sdpa"`
            and `"flash_attention_2"` attention; not for modes that skip, nor for Gemma 3, nor with
            `neftune_noise_alpha`, whose noise depends on the length of a row. Evaluation keeps its padding. If not
            given, sequences are packed where it is possible and was measured to be faster, which is on a CPU.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Compile the decoder layers one by one, for sequences of any length. Not for modes that skip, nor under FSDP
            and DeepSpeed.
        slow_micro_batch_size (`int`, *optional*):
            Number of samples per language-model pass in modes on all tokens. This reduces the memory of slow steps, so
            that a larger `per_device_train_batch_size` fits for the fast ones. Images are encoded once, and loss and
            gradients do not change. Not under FSDP and DeepSpeed.
        linear_patches (`bool`, *optional*, defaults to `False`):
            Run the patch embedding of Qwen-VL and GLM-V, a `Conv3d`, as a matrix product, which is faster on a CPU.
            Values change by rounding only, weights and what is saved do not. The given model is modified in place.
        max_bad_records (`int`, *optional*, defaults to `0`):
            How many unusable records to skip before the run stops. Each is replaced by the next usable one and listed
            in `bad_records.jsonl`. 0 stops at the first.
        max_image_pixels (`int`, *optional*, defaults to `89478485`):
            Width times height above which an image, or a frame of a video, is refused, before it is decoded.
        video_frames (`int`, *optional*, defaults to `32`):
            At most so many frames are taken of a video, evenly spaced from the first to the last.
        video_fps (`float`, *optional*):
            Take so many frames per second, where these are at most `video_frames`. By default `video_frames` in any
            case.
        image_aspect_ratio (`str`, *optional*):
            `"pad"` makes the model's processor pad images to a square with the mean colour, in training and in the
            saved model; the given processor is modified in place. By default it is unchanged. For LLaVA, whose
            processor otherwise crops images to a square.
        feature_cache (`str`, *optional*):
            Folder to cache the frozen vision tower's features in, for later epochs, stages and runs, concurrent ones
            included. Features are exactly the tower's; steps get faster, at the cost of disk space: 1.2 MB per image
            for LLaVA-1.5 in bfloat16.
        feature_cache_gib (`float`, *optional*, defaults to `50.0`):
            Maximum size of the folder in GiB, infinity for no limit. Once it is full, nothing more is stored and
            nothing is evicted.
        overwrite (`bool`, *optional*, defaults to `False`):
            Remove the checkpoints and the model that an earlier run left in `output_dir` when a new run starts there.
            Without it, such a folder is refused.

    Raises:
        SaccadeError: if a value is out of range; the message names the option and the fix.
    """

    reducer: str = "divprune"
    reducer_options: dict[str, Any] | str | None = None
    prune_ratio: float | None = None
    keep_tokens: int | None = None
    budget: str = "crop"
    adaptive: bool = False
    fit_length: int | None = None
    fit_slow: bool = False
    max_tokens_per_batch: int | None = None
    patch_tolerance: float | None = None
    newlines: str = "keep"
    slow_probability: float = 0.1
    schedule: str = "bernoulli"
    ratio_schedule: str = "constant"
    prune_ratio_start: float | None = None
    modes: list[ModeConfig] | None = None
    skip_vision: dict[str, Any] | str | None = None
    skip_mode: str = "fast"
    isolator_length: int = 4
    isolator_path: str | None = None
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    positions: str = "compact"
    projector_learning_rate: float | None = None
    vision_layer_decay: float | None = None
    float32_masters: bool | None = None
    freeze_vision_tower: bool = True
    freeze_projector: bool = False
    freeze_language_model: bool = False
    assistant_only_loss: bool | None = None
    conversation: str = "chat"
    max_length: int | None = 2048

    group_by: str = "none"
    padding_free: bool | None = None
    slow_micro_batch_size: int | None = None
    linear_patches: bool = False
    max_bad_records: int = 0
    max_image_pixels: int = MAX_PIXELS
    video_frames: int = VIDEO_FRAMES
    video_fps: float | None = None
    image_aspect_ratio: str | None = None
    feature_cache: str | None = None
    feature_cache_gib: float = 50.0
    overwrite: bool = False

    _VALID_DICT_FIELDS: ClassVar = [*SFTConfig._VALID_DICT_FIELDS, "reducer_options", "skip_vision"]

    @classmethod
    def preset(cls, name: str, **options: Any) -> "DualSpeedConfig":
        """The options of a preset, with `options` on top.

        Args:
            name: `"fast_then_slow"`: fast steps first and slow steps last, without isolator and self-distillation, at
                a learning rate that does not fall to zero; `"fast_then_few_slow"`: the same at original positions,
                with 3 % of slow steps. Not the paper's; docs/modes.md says when to use them.

        Raises:
            SaccadeError: if no preset has this name, and as for a new config.
        """
        return cls(**with_preset({**options, "preset": name}))

    def __post_init__(self) -> None:
        # transformers renamed the option and warns about the old name, which TRL's default still sets.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        # Not the fields' own types, which command-line parsers overwrite.
        for name, annotation in DualSpeedConfig.__annotations__.items():
            value = getattr(self, name)
            if not isinstance(value, PathLike) and get_origin(annotation) is not ClassVar:
                setattr(self, name, coerce(name, value, annotation))
        self._check_stock_options()
        super().__post_init__()
        if self.max_tokens_per_batch is not None:
            self._share_tokens()
        self.prune_ratio = self.pruning.prune_ratio
        check_choice("conversation", self.conversation, CONVERSATIONS)
        check_choice("skip_mode", self.skip_mode, ("fast", "slow"))
        if self.skip_mode != "fast" and self.skip_vision is None:
            raise SaccadeError(
                f"skip_mode={self.skip_mode!r} says which mode skips, and without skip_vision none does: give that, "
                "or leave this out"
            )
        check_choice("group_by", self.group_by, GROUP_BY)
        if self.image_aspect_ratio is not None:
            check_choice("image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        if self.modes is not None:
            self.modes = list(self._given_modes())
        self.mode_schedule()
        if self.ratio_schedule != "constant" and not any(mode.ratio_changes for mode in self.all_modes()):
            raise SaccadeError(
                f"ratio_schedule={self.ratio_schedule!r} changes the ratio of modes that drop tokens, and this run "
                "has none that takes it: set it to 'constant'"
            )
        for name in ("distill_temperature", "projector_learning_rate", "feature_cache_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SaccadeError(f"{name}={value!r}: give a number above 0")
        if self.vision_layer_decay is not None:
            if not 0 < self.vision_layer_decay <= 1:
                raise SaccadeError(
                    f"vision_layer_decay={self.vision_layer_decay!r}: give a number from 0 to 1, above 0"
                )
            if self.freeze_vision_tower:
                raise SaccadeError(
                    f"vision_layer_decay={self.vision_layer_decay!r} needs a tower that trains: set "
                    "freeze_vision_tower to false, or leave it out"
                )
        if self.freeze_vision_tower and self.freeze_projector and self.freeze_language_model:
            raise SaccadeError(
                "freeze_vision_tower, freeze_projector and freeze_language_model are all true: "
                "nothing would train, set one to false"
            )
        self._check_fit()
        self._check_patch_tolerance()
        self._check_rate_schedule()
        if self.packing:
            raise SaccadeError(
                "packing=True joins texts before their images are encoded: set padding_free=True, which packs the "
                "rows of a micro-batch after that"
            )
        if self.accelerator_config.dispatch_batches:
            raise SaccadeError(
                "accelerator_config has dispatch_batches=True: one rank would read the rows of all, and which of them "
                "are bad or repeated would be lost; leave it out"
            )
        skips = any(mode.action == "skip" for mode in self.all_modes())
        for name in ("padding_free", "torch_compile"):
            if skips and getattr(self, name):
                raise SaccadeError(f"{name}=True does not go with modes that skip tokens: set it to false")
        if self.padding_free and self.neftune_noise_alpha:
            raise SaccadeError(
                f"padding_free=True with neftune_noise_alpha={self.neftune_noise_alpha}: the noise is scaled by the "
                "length of a row, which packing would make that of the whole micro-batch; leave one of them out"
            )
        if self.torch_compile:
            check_compiling(self.torch_compile_backend, self.torch_compile_mode)
        if self.slow_micro_batch_size is not None:
            self._check_slow_micro_batch_size()
        if not 0 < self.max_image_pixels <= LARGEST_MAX_PIXELS:
            raise SaccadeError(
                f"max_image_pixels={self.max_image_pixels!r}: give a number of pixels from 1 to {LARGEST_MAX_PIXELS}"
            )
        _ = self.sampling
        self._check_feature_cache()
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise SaccadeError(
                f"loss_type={self.loss_type!r}, label_smoothing_factor={self.label_smoothing_factor!r}: "
                "DualSpeed trains on plain cross-entropy, leave them at 'nll' and 0"
            )
        if self.router_aux_loss_coef:
            raise SaccadeError(
                f"router_aux_loss_coef={self.router_aux_loss_coef!r}: DualSpeed trains on plain cross-entropy, and no "
                "step has a term that balances experts; leave it out"
            )
        # TRL reads None as the coefficient in the model's config, and applies it to stock steps only.
        self.router_aux_loss_coef = 0.0

    def _check_stock_options(self) -> None:
        """Refuse values of transformers' options that would fail in the middle of a run, or silently change it."""
        for entry in fields(self):
            check_finite(entry.name, getattr(self, entry.name, None))
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < least:
                raise SaccadeError(f"{name}={value!r}: give {least} or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SaccadeError(f"{name}={getattr(self, name)!r}: give a number in [0, 1)")
        if self.max_steps != -1 and self.max_steps < 1:
            raise SaccadeError(f"max_steps={self.max_steps!r}: give 1 or more, or -1 to train for num_train_epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise SaccadeError(f"num_train_epochs={self.num_train_epochs!r}: give more than 0, or set max_steps")
        if self.save_strategy == "steps" and not self.save_steps > 0:
            raise SaccadeError(f"save_steps={self.save_steps!r}: give 1 or more, or set save_strategy to 'no'")
        if self.train_sampling_strategy == "group_by_length":
            raise SaccadeError(
                "train_sampling_strategy='group_by_length' needs rows that are tokenized already, and evaluates them "
                "in another order: use group_by='shortened' or 'full'"
            )
        if self.auto_find_batch_size:
            raise SaccadeError(
                "auto_find_batch_size=True begins again at step 0, with weights that are trained already: leave it "
                "out and give a smaller per_device_train_batch_size, or bound memory with slow_micro_batch_size or "
                "max_tokens_per_batch"
            )
        if self.deepspeed and find_spec("deepspeed") is None:
            raise needs_package(f"deepspeed={self.deepspeed!r}", "deepspeed")
        self._choose_precision()

    def _choose_precision(self) -> None:
        """Default to bfloat16 on a GPU, as TRL does, and to float32 on a CPU, where TRL rejects its own default."""
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None and on_cpu and not self.fp16:
            self.bf16 = False
            if not self.use_cpu:
                logger.warning("no GPU was found: training on the CPU in float32; use_cpu=True says that it is meant")
        if on_cpu:
            # As transformers does for use_cpu: without a device to copy to, torch warns at each loader that it cannot.
            self.dataloader_pin_memory = False
        for name in ("bf16", "bf16_full_eval", "fp16", "fp16_full_eval"):
            if getattr(self, name) and not self.use_cpu and on_cpu:
                raise NoGPUError(
                    f"{name}=True needs a GPU, and none was found: for the CPU give {name}: false, use_cpu: true"
                )

    def _share_tokens(self) -> None:
        """Let each row of a micro-batch fit an equal share of its tokens, so that no row depends on the others."""
        rows = self.per_device_train_batch_size
        share = self.max_tokens_per_batch // rows
        if share < 1:
            raise SaccadeError(
                f"max_tokens_per_batch={self.max_tokens_per_batch!r} with per_device_train_batch_size={rows}: give at "
                "least as many tokens as the longest text has, for each row"
            )
        self.fit_length = share if self.fit_length is None else min(share, self.fit_length)
        self.fit_slow = True

    def _check_fit(self) -> None:
        if self.fit_slow and self.fit_length is None:
            raise SaccadeError(
                "fit_slow=True says where fit_length holds, and that is not given: give it, or drop this"
            )
        if self.fit_length is None:
            return
        if any(mode.action == "skip" for mode in self.all_modes()):
            raise SaccadeError(
                f"fit_length={self.fit_length}: a mode that skips runs on all visual tokens; leave it out"
            )
        if not any(mode.action == "drop" for mode in self._used_modes()):
            raise SaccadeError(
                f"fit_length={self.fit_length} shortens passes that drop tokens, and there are none: add fit_slow=True"
            )

    def _used_modes(self) -> list[ModeConfig]:
        """The modes that occur, or teach one that does."""
        modes = self.all_modes()
        used = {name for mode in modes if mode.probability for name in (mode.name, mode.teacher)}
        return [mode for mode in modes if mode.name in used]

    def _check_patch_tolerance(self) -> None:
        modes = {mode.name: mode for mode in self.all_modes()}
        if self.patch_tolerance is not None and all(mode.patch_tolerance is None for mode in self._used_modes()):
            raise SaccadeError(
                f"patch_tolerance={self.patch_tolerance} holds for passes that drop tokens, and there are none: leave "
                "it out"
            )
        for mode in modes.values():
            if mode.teacher is not None:
                _ = mode.needs | modes[mode.teacher].needs

    def _check_rate_schedule(self) -> None:
        # Built here for a throwaway parameter, since the trainer builds it only after loading the model and the data.
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, dict(self.lr_scheduler_kwargs or {}))
        except (TypeError, ValueError) as error:
            kind = SchedulerType(self.lr_scheduler_type).value
            raise SaccadeError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs!r} does not fit lr_scheduler_type={kind!r}: {error}; "
                "beside a preset, which sets both, leave lr_scheduler_type out or give lr_scheduler_kwargs too (null "
                "for none)"
            ) from error

    def _check_slow_micro_batch_size(self) -> None:
        name = f"slow_micro_batch_size={self.slow_micro_batch_size!r}"
        if not any(mode.keeps_all for mode in self.all_modes()):
            raise SaccadeError(f"{name} is for modes on all tokens, but this run has none: leave it out")
        if self.adaptive:
            raise SaccadeError(
                f"{name} with adaptive=True, which distributes tokens over a whole micro-batch: drop one"
            )
        if self.fp16:
            raise SaccadeError(f"{name} with fp16=True, whose loss is scaled: use bf16=True")
        fits = any(mode.keeps_all and mode.action == "drop" for mode in self.all_modes())
        if fits and self.neftune_noise_alpha:
            raise SaccadeError(
                f"{name} with neftune_noise_alpha={self.neftune_noise_alpha} and rows that are made to fit: the noise "
                "is scaled by the longest row of a pass, and each part would have its own; leave one of them out"
            )

    def _check_feature_cache(self) -> None:
        if self.feature_cache is None:
            return
        if not str(self.feature_cache):
            raise SaccadeError(f"feature_cache={self.feature_cache!r} is not a folder: give one, or leave it out")
        if not self.freeze_vision_tower:
            raise SaccadeError(
                f"feature_cache={self.feature_cache!r} keeps the features of a frozen tower, and "
                "freeze_vision_tower=false trains it: leave one of them out"
            )
        for mode in self.all_modes():
            check_needs(self.feature_cache, mode.name, mode.needs)

    def mode_schedule(self) -> ModeSchedule:
        """The configured schedule, for a stage that trains the language model."""
        shares = {mode.name: mode.probability for mode in self.all_modes()}
        return ModeSchedule(self.seed, shares, self.schedule)

    def all_modes(self) -> tuple[ModeConfig, ...]:
        """The modes of the run; the first is the one that stage one uses."""
        modes = self._given_modes()
        if not self.fit_slow:
            return modes
        fitting = self.pruning.replace(prune_ratio=0.0, patch_tolerance=None)
        return tuple(
            replace(mode, action="drop", pruning=fitting, isolator=False) if mode.action == "keep" else mode
            for mode in modes
        )

    def _given_modes(self) -> tuple[ModeConfig, ...]:
        """The modes, of which those on all tokens may be longer than `fit_length`."""
        skip = self.skip_options
        if self.modes is None and skip is not None and self._trains_on_all:
            return (ModeConfig("skip", 1.0, "skip", skip_vision=skip),)
        defaults = {"pruning": self.pruning, "isolator": self.isolator_length > 0, "skip_vision": skip}
        defaults |= {name: getattr(self, name) for name in ("ratio_schedule", "prune_ratio_start")}
        if self.modes is not None:
            modes = listed(self.modes, self.pruning)
        else:
            skips = None if skip is None else self.skip_mode
            modes = fast_and_slow(self.slow_probability, self.distill_weight > 0, skips)
        return tuple(mode.with_defaults(**defaults) for mode in modes)

    @property
    def skip_options(self) -> SkipVisionConfig | None:
        """The options of Skip-Vision, or None if nothing skips."""
        return None if self.skip_vision is None else SkipVisionConfig.from_options(self.skip_vision)

    @property
    def sampling(self) -> Sampling:
        """Which frames are taken of a video."""
        return Sampling(self.video_frames, self.video_fps)

    @property
    def pruning(self) -> PruningConfig:
        """How fast steps reduce visual tokens."""
        return PruningConfig(**{name: getattr(self, name) for name in PRUNING_OPTIONS})

    @property
    def is_ordinary(self) -> bool:
        """Whether these options ask for ordinary supervised fine-tuning."""
        return self.modes is None and self.skip_vision is None and self._trains_on_all

    @property
    def takes_stock_steps(self) -> bool:
        """Whether TRL's own step and loss suffice, which run on padded full-length rows, all at once."""
        changed = self.padding_free or self.fit_slow
        return self.is_ordinary and not changed and self.slow_micro_batch_size is None

    @property
    def _trains_on_all(self) -> bool:
        return self.pruning.keeps_fitting and self.slow_probability == 1 and self.distill_weight == 0

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, without tokens of accounts."""
        return {**super().to_dict(), "modes": _plain(self.modes)}

    def resume_state(self) -> dict[str, Any]:
        """The options that a resumed run must share, as plain values: all but those in `FREE_TO_CHANGE`."""
        names = [entry.name for entry in fields(self) if entry.init and entry.name not in FREE_TO_CHANGE]
        return {**{name: _plain(getattr(self, name)) for name in names}, **self._length()}

    def _length(self) -> dict[str, float | None]:
        """The length of the run if the learning rate, a ratio or the order of modes depends on it; otherwise a resumed
        run may be longer."""
        constant = SchedulerType(self.lr_scheduler_type).value.startswith("constant") and self.schedule != "sequential"
        constant = constant and all(mode.ratio_schedule != "linear" for mode in self.all_modes())
        if constant and not 0 < self.warmup_steps < 1:
            return {"max_steps": None, "num_train_epochs": None}
        if self.max_steps > 0:
            return {"max_steps": self.max_steps, "num_train_epochs": None}
        return {"max_steps": None, "num_train_epochs": self.num_train_epochs}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
