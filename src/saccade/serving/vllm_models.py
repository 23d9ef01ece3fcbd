"""vLLM's own models, with a vision side that prunes. Imported by vLLM where it serves one of them.

The language model is vLLM's; the tower, the projector and the selection are those of the stock model in transformers,
so that a reducer sees what it saw in training. Folders that do not prune run on vLLM's models as they are.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
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
"""Fields that travel with an image: the tokens it stood for, and the positions of those that are left."""
SIZES = ("num_patches", "image_num_patches")
"""Fields that say how many of the pixels behind one another are of an image."""


def isolator_of(config: Any) -> Tensor | None:
    """The isolator's rows `(l, D)` of a config, or None."""
    return None if config.isolator is None else ModeIsolator.from_pretrained(config.isolator)().detach()


class PrunedProcessor:
    """Goes before one of vLLM's processors: shortens what stands for an image, and marks what is cached."""

    def prune_as(self, config: Any, model_config: Any) -> None:
        """Set up, once the stock processor is."""
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
                "image_embeds: this server prunes images by itself and takes no features; send the image, or serve "
                "with --hf-overrides '{\"saccade\": false}'"
            )
        items = out_mm_kwargs["image"]
        return {**updates, "image": [self._shorter(*pair) for pair in zip(updates["image"], items, strict=True)]}

    def _shorter(self, updates: Sequence[Any], item: Any) -> list[Any]:
        """The updates of one image's placeholders, with fewer of them."""
        ids = torch.tensor(updates[0].content.full)
        fields = {name: torch.as_tensor(item[name].data).cpu() for name in FIELDS if name in item}
        outline = self.shortener.outline(ids, fields)
        item[IDS] = _field(IDS, ids)
        if self.carries_positions:
            # Negative where they are not known: how far behind 0 the image then starts, see `recompute`.
            known = outline.positions.masked_fill(outline.visual, -1)
            length = torch.full_like(known[:, :1], outline.length)
            item[POSITIONS] = _field(POSITIONS, torch.cat((known, length), dim=1))
        visual = outline.visual
        content = PromptUpdateDetails(full=outline.ids, is_embed=lambda _: visual)
        return [replace(update, content=content) for update in updates]


def _field(name: str, value: Tensor) -> Any:
    return MultiModalFieldConfig.batched("image", keep_on_cpu=True).build_elems(name, [value])[0]


class PrunedModel:
    """Goes before one of vLLM's models: an image's features are those of the tokens that are kept."""

    supports_multimodal_pruning = True
    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        config = pruning_of(model)
        self.shortener: Shortener | None = None
        if config is None:
            # Where vLLM's own model cannot prune videos, it still cannot.
            self.supports_multimodal_pruning = hasattr(super(), "recompute_mrope_positions")
            return
        for name in self._tower_model_names:
            holder, _, leaf = name.rpartition(".")
            module = self.get_submodule(name).to("meta")
            setattr(self.get_submodule(holder), leaf, StageMissingLayer("image tower", module))
        device = vllm_config.device_config.device
        weights = vllm_config.load_config.load_format != "dummy"
        family = tower_family(model.model, model.dtype, device, revision=model.revision, weights=weights)
        isolator = isolator_of(config)
        isolator = None if isolator is None else isolator.to(device=device, dtype=model.dtype)
        # No module, so that vLLM looks for no weights of it.
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
        """Rows `(n, D)`, and where tokens have positions, those behind them, bit for bit in the dtype of the rows."""
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
        # A token that comes again, after its request was put off, has its position already.
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


def _let_cpu_runner_ask() -> None:
    """Let vLLM's runner on CPUs ask its model for positions where it prunes, as the runner on GPUs does."""
    module = sys.modules.get("vllm.v1.worker.cpu_model_runner")
    if module is None:
        return

    def asks(runner: Any) -> bool:
        enabled = runner.model_config.multimodal_config.is_multimodal_pruning_enabled()
        return enabled and isinstance(getattr(runner, "model", None), PrunedModel)

    # The runner's constructor has said no already; a property goes before what it wrote.
    module.CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda *_: None)


def _delta(positions: Tensor) -> int:
    """How far positions `(3, S)` run ahead of places behind the prompt."""
    return int(positions[:, -1].max()) + 1 - positions.shape[1]


def _images(kwargs: Mapping[str, Any]) -> Iterable[dict[str, Tensor]]:
    """The fields of each image of a batch, as the processor had them of one image."""
    count = len(kwargs[IDS])
    sizes = next((kwargs[name] for name in SIZES if name in kwargs), None)
    if "image_grid_thw" in kwargs:
        sizes = torch.as_tensor(kwargs["image_grid_thw"]).prod(dim=-1)
    for name in FIELDS:
        if name in kwargs and sizes is not None and name.startswith("pixel"):
            kwargs[name] = kwargs[name].split(torch.as_tensor(sizes).reshape(-1).tolist())
    return ({name: torch.as_tensor(kwargs[name][n]) for name in FIELDS if name in kwargs} for n in range(count))


def _pruned(stock: type) -> type:
    """vLLM's model `stock`, that prunes where its folder says so."""
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
        kind = type(found)  # `given.processor` may be a function that chooses it
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
