"""The cost of samples in each mode: tokens, operations, and memory for the backward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig

from saccade.dualspeed.masters import HALF
from saccade.dualspeed.modes import ModeConfig
from saccade.families import get_family
from saccade.reducers import PruningConfig
from saccade.training.flops import (
    TextShape,
    VisualRows,
    head_flops,
    projector_flops,
    skip_rows,
    tower_flops,
    training_flops,
)
from saccade.training.lengths import SampleLength
from saccade.training.model_presets import Shape
from saccade.training.models import NF4_BYTES, quantized_weights
from saccade.training.recipe import Recipe


@dataclass(frozen=True)
class ModeCost:
    """The cost of the mean sample in one mode.

    Args:
        kept, skipped, summary, isolator: tokens of an image in the trained pass.
        length: length of the whole sequence.
        cut: the share of samples that keep fewer visual tokens, so that they fit.
        flops, language_flops: operations of the trained and the teacher's pass, and of these the language model's.
        samples: how many samples of a micro-batch run at a time.
        activations: bytes that the backward pass needs for the longest sample.
    """

    name: str
    probability: float
    kept: int
    skipped: int
    summary: int
    isolator: int
    length: float
    cut: float
    flops: float
    language_flops: float
    samples: int
    activations: float


class Costs:
    """Computes the costs of one recipe on one model."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        shape: Shape,
        config: PreTrainedConfig,
        lengths: Mapping[SampleLength, int],
    ) -> None:
        self.recipe, self.model, self.shape, self.config = recipe, model, shape, config
        self.family = get_family(model)
        self.text, self.lengths = TextShape.of(config), lengths
        self.vision = self._vision()
        layers = list(self.family.language_layers.named_parameters())
        self.trains_language = any(p.requires_grad for _, p in layers)
        adapters = [(name, p.numel()) for name, p in layers if "lora_" in name]
        self.adapters = sum(count for _, count in adapters)
        self.adapters_attention = sum(count for name, count in adapters if "mlp" not in name)

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters of the stock model, of trainable ones, and of adapters."""
        every = dict(self.model.named_parameters())
        adapters = sum(p.numel() for name, p in every.items() if "lora_" in name)
        copies = sum(p.numel() for name, p in every.items() if "modules_to_save" in name)
        total = sum(p.numel() for p in every.values())
        trained = sum(p.numel() for p in every.values() if p.requires_grad)
        return {"total": total - adapters - copies, "trainable": trained, "adapters": adapters}

    def own_parameters(self) -> int:
        """Number of parameters of isolator and summary head, which are in float32."""
        args, width = self.recipe.trainer, self.text.width
        if args.is_ordinary:
            return 0
        modes = args.all_modes()
        isolator = args.isolator_length * width if any(mode.isolator for mode in modes) else 0
        head = 3 * width if any(mode.skip_vision and mode.skip_vision.summary for mode in modes) else 0
        return isolator + head

    def modes(self) -> list[ModeCost]:
        """Each mode of the run with its teacher; a stage that trains no decoder layer has a single mode."""
        args = self.recipe.trainer
        if args.is_ordinary:
            fitting = args.all_modes()[-1] if args.fit_slow else ModeConfig("all_tokens", 1.0, "keep")
            return [self.of(replace(fitting, name="all_tokens", teacher=None))]
        modes = args.all_modes()
        if not self.trains_language:
            return [self.of(replace(modes[0], probability=1.0, teacher=None))]
        named = {mode.name: mode for mode in modes}
        learns = args.distill_weight > 0
        return [self.of(mode, named[mode.teacher] if mode.teacher and learns else None) for mode in modes]

    def rows(self, mode: ModeConfig) -> tuple[VisualRows, int]:
        """Visual tokens of a mode, and isolator rows."""
        tokens = self.shape.visual_tokens
        if mode.action == "skip":
            crop = tokens
            if mode.skip_vision.split == "thumbnail":
                crop = self.shape.grid[0] * self.shape.grid[1]
            return skip_rows(mode.skip_vision, crop, getattr(self.config, "sides", ())), 0
        if mode.action == "keep":
            return VisualRows(tokens), 0
        isolator = self.recipe.trainer.isolator_length if mode.isolator else 0
        return VisualRows(self._kept(mode.mean_pruning)), isolator

    def _kept(self, pruning: PruningConfig, images: int = 1) -> int:
        """Number of tokens kept of an image, with one budget for its thumbnail and its large picture or one each; or
        of several images that share a budget."""
        if pruning.keeps_fitting:
            return images * self.shape.visual_tokens
        newlines, tokens = images * self.shape.newlines, images * self.shape.visual_tokens
        small = self.shape.grid[0] * self.shape.grid[1]
        pictures = [(tokens, newlines)]
        if newlines and pruning.budget == "crop":
            pictures = [(small, 0), (tokens - small, newlines)]
        kept = 0
        for available, lines in pictures:
            count = min(pruning.count(available), available - lines)
            if pruning.newlines == "keep":
                count = min(max(1, pruning.count(available) - lines), available - lines) + lines
            kept += count
        return kept

    def of(self, mode: ModeConfig, teacher: ModeConfig | None = None) -> ModeCost:
        """The cost of the mean sample in one mode."""
        rows, isolator = self.rows(mode)
        total = sum(self.lengths.values())
        length = cut = vision = language = activations = 0.0
        for sample, count in self.lengths.items():
            share = count / total
            own, own_isolator, was_cut = self._sample_rows(sample, mode)
            tokens = own.total + own_isolator + sample.text
            length, cut = length + share * tokens, cut + share * was_cut
            vision += share * self.vision * sample.images
            language += share * self._language(sample, own, own_isolator)
            # Without images a sample is the same in all modes, and has no teacher.
            if teacher is not None and sample.images:
                language += share * self._forward(sample, *self._sample_rows(sample, teacher)[:2])
            if mode.ratio_changes:
                # The memory must suffice for the step that keeps most.
                mildest = replace(mode, pruning=mode.mildest_pruning, ratio_schedule="constant")
                most, most_isolator, _ = self._sample_rows(sample, mildest)
                tokens = most.total + most_isolator + sample.text
            activations = max(activations, self._activations(sample, tokens, own.skipped))
        args = self.recipe.trainer
        samples = args.per_device_train_batch_size
        if mode.keeps_all and args.slow_micro_batch_size is not None:
            samples = min(samples, args.slow_micro_batch_size)
        return ModeCost(
            mode.name,
            mode.probability,
            *(rows.retained, rows.skipped, rows.summary, isolator),
            *(length, cut, vision + language, language, samples, activations),
        )

    def _sample_rows(self, sample: SampleLength, mode: ModeConfig) -> tuple[VisualRows, int, bool]:
        """Visual and isolator rows of a sample in a mode, and whether visual ones were dropped to make it fit."""
        rows, isolator = self.rows(mode)
        retained, summary, skipped = (sample.images * count for count in (rows.retained, rows.summary, rows.skipped))
        if mode.action == "drop" and mode.pruning.budget == "sample" and sample.images:
            retained = self._kept(mode.mean_pruning, sample.images)
        rows, isolator = VisualRows(retained, summary, skipped), isolator * sample.images
        bound = mode.pruning.fit_length if mode.action == "drop" else None
        if bound is None or rows.total + isolator + sample.text <= bound:
            return rows, isolator, False
        room = max(sample.images, bound - isolator - sample.text)
        return VisualRows(min(rows.retained, room)), isolator, room < rows.retained

    def _forward(self, sample: SampleLength, rows: VisualRows, isolator: int) -> int:
        # If all weights train, forward plus backward costs three times the forward.
        stock = training_flops(self.text, rows, sample.text + isolator, sample.learned) // 3
        return stock + self._adapter_flops(sample, rows, isolator)

    def _language(self, sample: SampleLength, rows: VisualRows, isolator: int) -> int:
        """Forward and backward, plus the forward that gradient checkpointing repeats in every layer."""
        full = self.trains_language and not self.recipe.options.lora
        trained = "language" if full else "projector"
        flops = training_flops(self.text, rows, sample.text + isolator, sample.learned, trained)
        flops += 3 * self._adapter_flops(sample, rows, isolator)
        if self.recipe.trainer.gradient_checkpointing:
            flops += self._forward(sample, rows, isolator) - head_flops(self.text, sample.learned)
        return flops

    def _adapter_flops(self, sample: SampleLength, rows: VisualRows, isolator: int) -> int:
        full = rows.kept + isolator + sample.text
        return 2 * (full * self.adapters + rows.skipped * self.adapters_attention)

    def _vision(self) -> int:
        """Tower and projector on the full image, once per step; three times as much if they train."""
        if not self.shape.crops:
            return 0
        tower = tower_flops(self.config, self.shape.crops, self.shape.grid)
        projector = projector_flops(self.config, self.shape.crops, self.shape.grid)
        towers = 3 if any(p.requires_grad for p in self.family.vision_tower.parameters()) else 1
        projectors = 3 if any(p.requires_grad for p in self.family.projector.parameters()) else towers
        return towers * tower + projectors * projector

    def memory(self, modes: Sequence[ModeCost], shards: int, own: int) -> dict[str, float]:
        """Estimated bytes per device, without the framework's own memory, fragmentation and buffers.

        Trainable half-precision weights have float32 masters and optimizer states: 2 bytes for the weight, 2 for the
        gradient, 4 for the master and 8 for the states. FSDP and DeepSpeed arrive at the same sum. The mode that needs
        most memory counts. `own` is the number of parameters of isolator and summary head.
        """
        four_bit = set()
        if self.recipe.options.load_in_4bit:
            four_bit = {id(weight) for weight in quantized_weights(self.family.model) if not weight.requires_grad}
        weights = sum(p.numel() * (NF4_BYTES if id(p) in four_bit else p.itemsize) for p in self.model.parameters())
        gradients = sum(p.numel() * p.itemsize for p in self.model.parameters() if p.requires_grad) + 4 * own
        optimizer = str(getattr(self.recipe.trainer.optim, "value", self.recipe.trainer.optim))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) + own
        in_half = sum(p.numel() for p in self.model.parameters() if p.requires_grad and p.dtype in HALF)
        with_masters = in_half if self.recipe.trainer.float32_masters is not False else 0
        states = 2 * trained if "8bit" in optimizer else 8 * trained - 4 * (in_half - with_masters)
        found = {
            "weights": (weights + 4 * own) / shards,
            "gradients": gradients / shards,
            "masters": 4 * with_masters / shards,
            "optimizer": states / shards,
            # The optimizer needs float32 gradients, in the memory that the activations have freed.
            "activations": max(2 * with_masters / shards, *(mode.samples * mode.activations for mode in modes)),
        }
        return {**found, "total": sum(found.values())}

    def _activations(self, sample: SampleLength, length: int, skipped: int) -> float:
        """Bytes that the backward pass needs for one sample.

        Per layer: norms and residuals 8 d, queries and attended values 3 q, keys and values 4 k, and 4 f in the
        feed-forward network. With checkpointing, only one layer at a time has these, and every layer keeps its input.
        Logits are stored three times in float32: the logits, their softmax, their gradient.
        """
        args, text = self.recipe.trainer, self.text
        size = 2 if args.bf16 or args.fp16 else next(self.model.parameters()).itemsize
        fed = length - skipped
        layer = size * (
            length * (8 * text.width + 3 * text.query_width + 4 * text.key_width) + 4 * fed * text.feed_forward
        )
        inputs = size * length * text.width
        whole = layer + text.layers * inputs if args.gradient_checkpointing else text.layers * layer
        return whole + 3 * 4 * sample.learned * text.vocabulary
