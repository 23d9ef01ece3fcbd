"""vLLM's own models with a pruning vision side. vLLM imports this module when it serves one of them.

The language model is vLLM's; the tower, the projector and the selection are those of the stock model in transformers,
so that a reducer sees what it saw in training. Folders that do not prune run on vLLM's models as they are.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.multimodal.registry import _ProcessorFactories

from saccade.errors import SaccadeError
from saccade.pruning import ModeIsolator
from saccade.serving.shorten import FIELDS, Features, Shortener
from saccade.serving.tower import bare_family, tower_family
from saccade.serving.vllm_plugin import ARCHITECTURES, carries_positions, fingerprint, pruning_of

IDS, POSITIONS = "saccade_ids", "saccade_positions"
"""Fields passed along with an image: its original tokens, and the positions of the remaining ones."""
SIZES = ("num_patches", "image_num_patches")
"""Fields that say how many of the concatenated pixels belong to each image."""


def isolator_of(config: Any) -> Tensor | None:
    """The rows `(l, D)` of a config's isolator, or None."""
    return None if config.isolator is None else ModeIsolator.from_pretrained(config.isolator)().detach()


class PrunedProcessor:
    """Mixin for one of vLLM's processors: shortens an image's placeholders, and marks cache entries."""

    def prune_as(self, config: Any, model_config: Any) -> None:
        """Set up, after the stock processor."""
        family = bare_family(model_config.model, model_config.revision)
        self.shortener = Shortener(family, config, isolator_of(config))
        self.mark = fingerprint(config)
        self.carries_positions = carries_positions(model_config)

    def _get_mm_hashes(self, inputs: Any) -> Mapping[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)
        return {kind: [f"{each}-{self.mark}" for each in found] for kind, found in hashes.items()}

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not updates.get("image"):
            return updates
        if isinstance(mm_items["image"], ImageEmbeddingItems):
            raise SaccadeError(
                "image_embeds: this server prunes images itself and does not accept features; send the image, or "
                "serve with --hf-overrides '{\"saccade\": false}'"
            )
        items = out_mm_kwargs["image"]
        return {**updates, "image": [self._shorter(*pair) for pair in zip(updates["image"], items, strict=True)]}

    def _shorter(self, updates: Sequence[Any], item: Any) -> list[Any]:
        """The updates of one image, with fewer placeholders."""
        ids = torch.tensor(updates[0].content.full)
        fields = {name: torch.as_tensor(item[name].data).cpu() for name in FIELDS if name in item}
        outline = self.shortener.outline(ids, fields)
        item[IDS] = _field(IDS, ids)
        if self.carries_positions:
            # -1 where unknown; the image's start is subtracted later, and read by `recompute_mrope_positions`.
            known = outline.positions.masked_fill(outline.visual, -1)
            length = torch.full_like(known[:, :1], outline.length)
            item[POSITIONS] = _field(POSITIONS, torch.cat((known, length), dim=1))
        visual = outline.visual
        content = PromptUpdateDetails(full=outline.ids, is_embed=lambda _: visual)
        return [replace(update, content=content) for update in updates]


def _field(name: str, value: Tensor) -> Any:
    return MultiModalFieldConfig.batched("image", keep_on_cpu=True).build_elems(name, [value])[0]


class PrunedModel:
    """Mixin for one of vLLM's models: an image's features are those of its kept tokens."""

    supports_multimodal_pruning = True
    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        config = pruning_of(model)
        self.shortener: Shortener | None = None
        if config is None:
            # vLLM's own pruning of videos stays off where the stock model does not support it.
            self.supports_multimodal_pruning = hasattr(super(), "recompute_mrope_positions")
            return
        for name in self._tower_model_names:
            holder, _, leaf = name.rpartition(".")
            module = self.get_submodule(name)
            _free_parameters(module)
            setattr(self.get_submodule(holder), leaf, StageMissingLayer("image tower", module))
        device = vllm_config.device_config.device
        weights = vllm_config.load_config.load_format != "dummy"
        family = tower_family(model.model, model.dtype, device, revision=model.revision, weights=weights)
        isolator = isolator_of(config)
        isolator = None if isolator is None else isolator.to(device=device, dtype=model.dtype)
        # Not registered as a submodule, or vLLM would look for its weights.
        self.shortener = Shortener(family, config, isolator)
        self.carries_positions = carries_positions(model)
        _let_cpu_runner_ask()

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.shortener is None or IDS not in kwargs:
            return super().embed_multimodal(**kwargs)
        images = list(_images(kwargs))
        device = images[0]["pixel_values"].device
        ids = [tokens.to(device) for tokens in kwargs[IDS]]
        found = self.shortener.features(ids, images)
        return tuple(self._packed(each) for each in found)

    def _packed(self, features: Features) -> Tensor:
        """Rows `(n, D)`; if tokens carry positions, these are appended as bits reinterpreted in the rows' dtype."""
        rows = features.rows
        if not self.carries_positions:
            return rows
        positions = features.positions.expand(3, -1).t().to(torch.int32).contiguous().view(rows.dtype)
        return torch.cat((rows, positions), dim=1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if self.shortener is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        positions, end, column = torch.empty(3, len(input_tokens), dtype=torch.long), 0, 0
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            start = feature.mm_position.offset
            text = start - column
            positions[:, column:start] = torch.arange(end, end + text)
            end, column = end + text, start + feature.mm_position.length
            known = torch.as_tensor(feature.data[POSITIONS].data)
            shifted = torch.where(known < 0, known - end, known + end)
            positions[:, start:column] = shifted[:, :-1]
            end += int(known[0, -1])
        positions[:, column:] = torch.arange(end, end + len(input_tokens) - column)
        return positions, end - column

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if self.shortener is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        positions = mrope_positions.clone()
        if not multimodal_embeddings:
            return multimodal_embeddings, positions, _delta(positions)
        packed = torch.cat(tuple(multimodal_embeddings))
        extra = 3 * torch.int32.itemsize // packed.element_size()
        relative = packed[:, -extra:].contiguous().view(torch.int32).t().to(positions)  # (3, n)
        ids = torch.as_tensor(input_ids, device=positions.device)
        place = self.shortener.family.placeholder(ids).nonzero().squeeze(1)
        place = place[place >= num_computed_tokens][: relative.shape[1]]
        start = positions[:, place]
        # A token that is processed again, after its request was preempted, already has its position.
        positions[:, place] = torch.where(start < 0, relative - 1 - start, start)
        return [each[:, :-extra] for each in multimodal_embeddings], positions, _delta(positions)

    def forward(
        self,
        input_ids: Any,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> Any:
        if self.shortener is not None and positions.dim() == 2 and not self.shortener.family.uses_mrope:
            positions = positions[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)


def _free_parameters(module: nn.Module) -> None:
    """Drop the values of a module's parameters. Its buffers stay: vLLM shares rotary embeddings among all models."""
    for each in module.modules():
        for name, value in each.named_parameters(recurse=False):
            each.register_parameter(name, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))


def _let_cpu_runner_ask() -> None:
    """Make vLLM's CPU runner ask a pruning model for positions, as its GPU runner does."""
    module = sys.modules.get("vllm.v1.worker.cpu_model_runner")
    if module is None:
        return

    def asks(runner: Any) -> bool:
        enabled = runner.model_config.multimodal_config.is_multimodal_pruning_enabled()
        return enabled and isinstance(getattr(runner, "model", None), PrunedModel)

    # The runner's constructor has already set it to False; a property takes precedence over that attribute.
    module.CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda *_: None)


def _delta(positions: Tensor) -> int:
    """The difference between the position and the index of tokens after the prompt, from its positions `(3, S)`."""
    return int(positions[:, -1].max()) + 1 - positions.shape[1]


def _images(kwargs: Mapping[str, Any]) -> Iterable[dict[str, Tensor]]:
    """The fields of each image of a batch, as the processor returned them for that image alone."""
    count = len(kwargs[IDS])
    sizes = next((kwargs[name] for name in SIZES if name in kwargs), None)
    if "image_grid_thw" in kwargs:
        sizes = torch.as_tensor(kwargs["image_grid_thw"]).prod(dim=-1)
    for name in FIELDS:
        if name in kwargs and sizes is not None and name.startswith("pixel"):
            kwargs[name] = kwargs[name].split(torch.as_tensor(sizes).reshape(-1).tolist())
    return ({name: torch.as_tensor(kwargs[name][n]) for name in FIELDS if name in kwargs} for n in range(count))


def _pruned(stock: type) -> type:
    """A subclass of vLLM's model `stock` that prunes if its folder says so."""
    model = type(stock.__name__, (PrunedModel, stock), {"__module__": __name__})
    given = stock._processor_factory

    def info(context: Any) -> Any:
        found = given.info(context)
        if pruning_of(context.model_config) is not None:
            limits = {name: limit if name == "image" else 0 for name, limit in found.get_supported_mm_limits().items()}
            found.get_supported_mm_limits = lambda: limits
        return found

    def processor(info: Any, dummy_inputs: Any) -> Any:
        found = given.processor(info, dummy_inputs)
        config = pruning_of(info.ctx.model_config)
        if config is None:
            return found
        kind = type(found)  # `given.processor` may be a function that chooses the class
        pruned = type(kind.__name__, (PrunedProcessor, kind), {})(info, dummy_inputs)
        pruned.prune_as(config, info.ctx.model_config)
        return pruned

    model._processor_factory = _ProcessorFactories(info=info, processor=processor, dummy_inputs=given.dummy_inputs)
    return model


def __getattr__(name: str) -> type:
    """A model class by its architecture, imported when vLLM asks for it."""
    architecture = name.partition("_of_")[0]
    if architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, stock = ARCHITECTURES[architecture].partition(":")
    made = _pruned(getattr(import_module(f"vllm.model_executor.models.{module}"), stock))
    globals()[name] = made
    return made
