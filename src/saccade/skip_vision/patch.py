"""`apply_skip_vision`: patch a stock model in place so that it skips, until `remove()`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from saccade.companions import copy_whole, read_companion, save_companion
from saccade.errors import SaccadeError, kind_of
from saccade.families import Encoded, Family, get_family
from saccade.interfaces import by_name, check_takes
from saccade.pruning import prune
from saccade.pruning.cache import cache_of, next_positions
from saccade.pruning.given_prompt import generate_on, mask_of
from saccade.pruning.patching import (
    HANDLE,
    call_original,
    patch,
    patch_as_stock,
    sort_arguments,
    unpatch,
)
from saccade.skip_vision.cache import CacheState, cache_name, other_layers, read_length, state_of
from saccade.skip_vision.config import SkipVisionConfig
from saccade.skip_vision.conversation import go_on, last_part, note_ids, note_layout, unread
from saccade.skip_vision.language import CONFIG, ROLES_KEYWORD, SKIPPING, check_language_model, language_forward
from saccade.skip_vision.rows import STATE, patch_layers
from saccade.skip_vision.skipper import Skipper
from saccade.skip_vision.summary import SUMMARY_FILE, SUMMARY_NAME, SummaryHead, check_names, head_of

KEYS_TO_IGNORE = "_keys_to_ignore_on_save"


class SkipVision:
    """A model that skips, as `apply_skip_vision` returns it."""

    def __init__(self, family: Family, config: SkipVisionConfig) -> None:
        self.family = family
        self.config = config
        self._patched: list[nn.Module] = []
        self._ignored_before: Any = None
        self._removed: SummaryHead | None = None

    @property
    def model(self) -> nn.Module:
        return self.family.model

    @property
    def summary(self) -> SummaryHead | None:
        """The summary head, a module of the stock model until `remove()`; None without summaries."""
        return head_of(self.model) if self._removed is None else self._removed

    def prepare(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor | None = None,
        padding_side: str | None = None,
        encoded: Encoded | None = None,
    ) -> dict[str, Any]:
        """Convert processor outputs to the inputs that `forward` and `generate` run on.

        Args:
            inputs: what the processor returned, for any number of samples and images, optionally with `labels`.
            labels: long `(B, L)`, or None. Text with a label is what the model is trained to write.
            padding_side: of the result. Defaults to "left" if every row of `inputs` ends with a real token, else
                "right".
            encoded: the images' features, if the caller has them, including what the split needs.

        Returns:
            Inputs for `model(...)`, `model.generate(...)` or the model without its head: `input_ids`,
            `attention_mask`, `position_ids`, `mm_encoder_outputs`, `skip_roles` (long `(B, S)`, values of
            `saccade.tokens.Role`), the family's further per-token inputs, and `labels` if given.

        Raises:
            SaccadeError: if text and images do not match, or the images do not suit the split.
        """
        if padding_side not in (None, "left", "right"):
            raise SaccadeError(f"padding_side={padding_side!r}: use 'left' or 'right'")
        if inputs.get("input_ids") is None:
            raise SaccadeError("inputs has no 'input_ids': pass what the processor returned with return_tensors='pt'")
        inputs = dict(inputs)
        labels = inputs.pop("labels", None) if labels is None else labels
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if padding_side is None:
            padding_side = "left" if bool(inputs["attention_mask"][:, -1].all()) else "right"
        family, given = self.family, {"encoded": encoded, "labels": labels, "padding_side": padding_side}
        laid = prune(family, inputs, self._skipper, lambda laid: laid, **given)
        return laid.inputs if labels is None else {**laid.inputs, "labels": laid.labels}

    def save_pretrained(self, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        """Write the summary head and the options to `folder/skip_vision.saccade`, and return the path.

        Args:
            tensors: the head's gathered tensors by name, if this process holds only shards of them.

        Raises:
            OSError: if the file cannot be written.
            SaccadeError: if PEFT has wrapped the head, whose tensors then have other names.
        """
        if tensors is None:
            tensors = {} if self.summary is None else self.summary.state_dict()
        check_names(tensors.keys())
        return save_companion(folder, SUMMARY_FILE, tensors, asdict(self.config))

    def load_summary(self, folder: str | Path) -> None:
        """Load the summary head's weights that `save_pretrained` wrote to `folder`; the options do not change.

        Raises:
            SaccadeError: if there is no such file, or it belongs to another model; if PEFT has wrapped the head.
        """
        if self.summary is None:
            return
        _, tensors = read_companion(folder, SUMMARY_FILE, "folder")
        if not tensors:
            raise SaccadeError(
                f"folder={str(folder)!r}: its model was trained without summary tokens, so it has no head for them; "
                "set summary=False"
            )
        own = dict(self.summary.named_parameters())
        check_names(own.keys())
        if {name: tuple(value.shape) for name, value in tensors.items()} != {
            name: tuple(value.shape) for name, value in own.items()
        }:
            width = self.model.config.get_text_config().hidden_size
            raise SaccadeError(
                f"folder={str(folder)!r}: its summary head does not fit a model of width {width}: it was trained for "
                "another model"
            )
        for name, parameter in own.items():
            copy_whole(tensors[name], parameter)

    def remove(self) -> None:
        """Restore the model. Does nothing the second time."""
        if self.model.__dict__.get(HANDLE) is not self:
            return
        for module in self._patched:
            unpatch(module)
            module.__dict__.pop(STATE, None)
        self._patched.clear()
        for name in (CONFIG, SKIPPING):
            self.family.language_model.__dict__.pop(name)
        del self.model.__dict__[HANDLE]
        if self.summary is not None:
            self._removed = self.summary  # it can be saved still
            delattr(self.model, SUMMARY_NAME)
            del self.model.__dict__[KEYS_TO_IGNORE]
            if self._ignored_before is not None:
                setattr(self.model, KEYS_TO_IGNORE, self._ignored_before)

    def _attach(self) -> None:
        model, config = self.model, self.config
        layers = self.family.language_layers
        chosen = range(*(config.layers or (0, len(layers))))
        language = self.family.language_model
        self._patched += patch_layers(layers, chosen)
        language.__dict__[SKIPPING] = [module for module in self._patched if STATE in module.__dict__]
        patch(language, language_forward)
        language.__dict__[CONFIG] = config
        patch_as_stock(model, _model_forward, "forward", ROLES_KEYWORD)
        patch_as_stock(model, _model_generate, "generate")
        self._patched += [language, model]
        if config.summary:
            # In bfloat16 its entries would be too coarse for updates at fine-tuning rates.
            head = SummaryHead(model.config.get_text_config().hidden_size).to(model.device)
            model.add_module(SUMMARY_NAME, head)
            self._ignored_before = model.__dict__.get(KEYS_TO_IGNORE)
            names = {f"{SUMMARY_NAME}.{name}" for name in head.state_dict()}
            setattr(model, KEYS_TO_IGNORE, set(getattr(model, KEYS_TO_IGNORE) or ()) | names)
        self._skipper = Skipper(self.family, config)
        model.__dict__[HANDLE] = self


def apply_skip_vision(
    model: nn.Module, config: SkipVisionConfig | str | Path | None = None, **options: Any
) -> SkipVision:
    """Patch a stock model in place so that it skips visual tokens: `forward` and `generate` take processor outputs as
    before.

    Args:
        model: a stock model of a known family, PEFT-wrapped or not.
        config: the options, by default the published 100/156; or a folder written by `save_pretrained` or a training
            run, to use its options and its summary head.
        options: fields of [`SkipVisionConfig`] that override the config's, such as `drop_kv=False`.

    Returns:
        The handle: `remove()` restores the model, `save_pretrained(folder)` writes the summary head and the options,
            `prepare(inputs)` returns the inputs for a custom training step.

    Raises:
        SaccadeError: if the model cannot skip, or does not support the options; if the folder has no options, or those
            of another model.
    """
    folder = config if isinstance(config, (str, Path)) else None
    if folder is not None:
        config = SkipVisionConfig.from_pretrained(folder, **options)
    elif config is None:
        config = SkipVisionConfig().replace(**options)
    elif not isinstance(config, SkipVisionConfig):
        raise SaccadeError(f"config is {kind_of(config)}: give a SkipVisionConfig, or the folder of a model")
    elif options:
        config = config.replace(**options)
    family = get_family(model)
    if HANDLE in family.model.__dict__:
        raise SaccadeError("model: it skips or prunes already; call `remove()` on what switched that on first")
    _check_model(family, config)
    skip = SkipVision(family, config)
    skip._attach()
    if folder is not None:
        try:
            skip.load_summary(folder)
        except SaccadeError:
            skip.remove()
            raise
    return skip


def _check_model(family: Family, config: SkipVisionConfig) -> None:
    """Check what can be checked before the first image."""
    count = len(family.language_layers)
    if config.layers is not None and config.layers[1] > count:
        raise SaccadeError(f"layers={config.layers!r}: there are {count} layers, end at {count} or before")
    language = family.language_model
    if family.recurrent:
        raise SaccadeError(
            f"model_type={family.model.config.model_type!r}: layers of its language model carry a state or convolve "
            "instead of attending, which Skip-Vision does not know; train it with DualSpeed"
        )
    if any(hasattr(layer, "experts") for layer in family.language_layers):
        raise SaccadeError(
            f"model_type={family.model.config.model_type!r}: its layers have experts beside the feed-forward network, "
            "which Skip-Vision does not know; train it with DualSpeed"
        )
    if family.text_between_lines:
        raise SaccadeError(
            f"model_type={family.model.config.model_type!r}: text stands after each line of an image's tokens, so "
            "that there is no place where all that is kept of an image stands together; train it with DualSpeed"
        )
    check_takes(type(family.model).forward, ("input_ids", "attention_mask", "position_ids"))
    cache_name(type(family.model).forward)
    check_language_model(language)
    others = other_layers(language.config)
    if config.drop_kv and others:
        raise SaccadeError(
            f"drop_kv=True: this language model has layers with a {others}, which count tokens by position, so none "
            "can be removed; set drop_kv=False"
        )
    if config.text_visibility != "all" and others:
        raise SaccadeError(
            f"text_visibility={config.text_visibility!r}: this language model has layers with a {others}, whose masks "
            "differ from the one that hides skipped tokens; use text_visibility='all'"
        )
    kind = language.config._attn_implementation
    if config.text_visibility != "all" and kind not in ("sdpa", "eager"):
        raise SaccadeError(
            f"text_visibility={config.text_visibility!r} needs a mask that attn_implementation={kind!r} does not "
            "support: load the model with 'sdpa' or 'eager', or use text_visibility='all'"
        )
    # Where text is between the crops of an image, each is laid out by itself, without a thumbnail beside it.
    if config.split == "thumbnail" and (family.thumbnail is None or family.text_between_crops):
        raise SaccadeError(
            f"split='thumbnail': images of model_type={family.model.config.model_type!r} have no thumbnail next to "
            "their crops; use split='cls_attention' or the name of a reducer"
        )


@torch.compiler.disable  # how many tokens stay depends on their values, which the compiler does not see
def _model_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, after rearranging visual tokens."""
    skip: SkipVision = model.__dict__[HANDLE]
    kwargs = by_name(model.forward, args, kwargs)
    cache = cache_of(kwargs)
    state, read = state_of(cache), read_length(cache)
    if kwargs.get(ROLES_KEYWORD) is not None or not skip.family.has_images(kwargs):
        return _laid_out_forward(skip, kwargs, state, read)
    inputs, others = sort_arguments(skip.family, kwargs)
    labels = others.pop("labels", None)
    given = inputs["input_ids"].shape[1]
    part, earlier = last_part(inputs, given)
    prepared = skip.prepare(part, labels)
    length = prepared["input_ids"].shape[1]
    if read:
        prepared = go_on(prepared, cache, state, earlier)
        prepared["input_ids"] = prepared["input_ids"][:, -length:]
        prepared["position_ids"] = prepared["position_ids"][..., -length:]
    output = call_original(model, **others, **prepared)
    cache = cache_of(output) if cache is None else cache
    note_ids(cache, prepared["input_ids"], read)
    note_layout(cache, given, length, read + length)
    return output


def _laid_out_forward(skip: SkipVision, kwargs: dict[str, Any], state: CacheState | None, read: int) -> Any:
    """The stock forward on tokens that are not to be rearranged, after `read` ones of a cache with this state."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    masked = isinstance(mask, Tensor) and mask.dim() == 2
    if state is not None and ids is not None:
        length = ids.shape[1]
        new = mask[:, -length:].to(ids) if masked else torch.ones_like(ids)
        if masked and kwargs.get(ROLES_KEYWORD) is None:
            state.hide(mask[:, :-length])
        if not state.gap and (masked or mask is None):
            # Some models make their masks before their language model, which could then not do this for them.
            kwargs["attention_mask"] = torch.cat((state.valid.to(new), new), dim=1)
        if skip.family.uses_mrope and kwargs.get("position_ids") is None:
            # The model would continue from its own last call, regardless of this cache.
            kwargs["position_ids"] = next_positions(state.next_position.unsqueeze(1) - 1, new, (3,))
    output = call_original(skip.model, **kwargs)
    cache = cache_of(kwargs)
    note_ids(cache_of(output) if cache is None else cache, ids, read)
    idle = skip.summary is not None and kwargs.get("mm_encoder_outputs") is None and torch.is_grad_enabled()
    if idle and isinstance(output, ModelOutput) and output.get("loss") is not None:
        output["loss"] = output["loss"] + skip.summary.idle()
    return output


def _model_generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock `generate`, after rearranging visual tokens; its output begins with the original prompt."""
    skip: SkipVision = model.__dict__[HANDLE]
    kwargs = by_name(model.generate, args, kwargs)
    if kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    kwargs["attention_mask"] = mask_of(model, kwargs)
    if kwargs.get("assistant_model") is not None:
        raise SaccadeError(
            "assistant_model: an assistant would need a separate layout; leave it out, or use prompt_lookup_num_tokens"
        )
    cache = cache_of(kwargs)
    state = state_of(cache)
    images = skip.family.has_images(kwargs)
    if kwargs.get(ROLES_KEYWORD) is not None or (not images and state is None):
        return call_original(model, method="generate", **kwargs)
    inputs, others = sort_arguments(skip.family, kwargs)
    length, read = inputs["input_ids"].shape[1], read_length(cache)
    with torch.no_grad():
        length = unread(inputs, cache, state) if read else length
        part, earlier = last_part(inputs, length)
        new = skip.prepare(part, padding_side="left")
        prepared = go_on(new, cache, state, earlier) if read else new
    sequence = prepared["input_ids"].shape[1]
    output = generate_on(model, inputs["input_ids"], {**others, **prepared})
    if cache is None and isinstance(output, ModelOutput):
        cache = cache_of(output)
    moved = images or not torch.equal(new["attention_mask"], part["attention_mask"].to(new["attention_mask"]))
    if moved:
        note_layout(cache, length, sequence - read, sequence)
    return output
