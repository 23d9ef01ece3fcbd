"""What tests of Skip-Vision share: options for tiny models, and as an oracle the stock model made to skip by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from saccade.families import get_family
from saccade.skip_vision import SkipVision, SkipVisionConfig, apply_skip_vision
from saccade.skip_vision.cache import cache_name
from saccade.tokens import Role

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
RAGGED = {"retained": 3, "skipped": 0.4}
"""Images of different sizes, and samples with different numbers of them, then skip different numbers of rows."""


def options_for(name: str, **options: Any) -> SkipVisionConfig:
    """A configuration that every family can run; Gemma's sliding windows cannot lose columns."""
    return SkipVisionConfig(**{"split": "divprune", "drop_kv": name != "gemma3", **RAGGED, **options})


@contextmanager
def skipping(model: PreTrainedModel, config: SkipVisionConfig) -> Iterator[SkipVision]:
    """The model with Skip-Vision, and without it afterwards. The head is the same each time, and not nearly a mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        skip = apply_skip_vision(model, config)
        if skip.summary is not None:
            torch.nn.init.normal_(skip.summary.score.weight, std=0.5)
            torch.nn.init.normal_(skip.summary.norm.weight, mean=1, std=0.2)
    try:
        yield skip
    finally:
        skip.remove()


@contextmanager
def masked_ffn(model: PreTrainedModel, skip: Tensor | None) -> Iterator[None]:
    """The stock model with the feed-forward output of the rows `skip`, bool `(B, L)`, set to zero in every layer."""

    def hide(module, args, output):
        return output if skip is None else output.masked_fill(skip.unsqueeze(-1), 0)

    handles = [layer.mlp.register_forward_hook(hide) for layer in get_family(model).language_layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_roles(prepared: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs that the stock model takes, and the roles."""
    inputs = dict(prepared)
    roles = inputs.pop("skip_roles")
    return inputs, roles


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, prepared: dict[str, Any]) -> Tensor:
    """Logits `(B, L, V)` of the unpatched model with masked feed-forward outputs, without a cache."""
    inputs, roles = without_roles(prepared)
    with masked_ffn(model, roles == Role.SKIPPED):
        return model(**inputs, use_cache=False).logits


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The argument that hands a cache to `forward` or `generate`, by the name that this version has for it."""
    return {cache_name(model.forward): cache}


class FullCache:
    """The unpatched model with all rows in its cache, skipped ones hidden from every token after the prompt."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.mask: Tensor | None = None
        self.position: Tensor | None = None

    @torch.no_grad()
    def read(self, prepared: dict[str, Any]) -> Tensor:
        """Read a prompt, or the next turn of a conversation: its last logits `(B, V)`."""
        inputs, roles = without_roles(prepared)
        mask = inputs["attention_mask"]
        if self.mask is not None:
            positions = inputs["position_ids"] + self.position.unsqueeze(1)
            inputs |= {"attention_mask": torch.cat((self.mask, mask), dim=1), "position_ids": positions}
        skip = roles == Role.SKIPPED
        with masked_ffn(self.model, skip):
            output = self.model(**inputs, **with_cache(self.model, self.cache), use_cache=True)
        hidden = mask.masked_fill(skip, 0)
        self.mask = hidden if self.mask is None else torch.cat((self.mask, hidden), dim=1)
        last = inputs["position_ids"][..., -1]
        self.position = (last.amax(dim=0) if last.dim() == 2 else last) + 1
        return output.logits[:, -1]

    @torch.no_grad()
    def write(self, token: Tensor) -> Tensor:
        """Logits `(B, V)` after one more token, long `(B,)`."""
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        position = self.position.unsqueeze(1)
        if get_family(self.model).uses_mrope:
            position = position.expand(3, -1, -1)
        output = self.model(
            input_ids=token.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=position,
            **with_cache(self.model, self.cache),
            use_cache=True,
        )
        self.position = self.position + 1
        return output.logits[:, -1]

    def greedy(self, logits: Tensor, count: int, banned: list[int]) -> tuple[Tensor, Tensor]:
        """The next `count` tokens `(B, count)` and the logits `(count, B, V)` that they come from."""
        tokens, seen = [], []
        for number in range(count):
            seen.append(logits)
            allowed = logits.clone()
            allowed[:, banned] = -torch.inf
            tokens.append(allowed.argmax(dim=1))
            if number < count - 1:
                logits = self.write(tokens[-1])
        return torch.stack(tokens, dim=1), torch.stack(seen)


def banned_tokens(model: PreTrainedModel) -> list[int]:
    """Placeholders, which a random model may write and has no features for, and the end, so that no row ends early."""
    text = model.config.get_text_config()
    every = torch.arange(text.vocab_size).unsqueeze(0)
    return [*get_family(model).placeholder(every)[0].nonzero().flatten().tolist(), text.eos_token_id]


def greedy_options(model: PreTrainedModel, count: int) -> dict[str, Any]:
    return {
        "max_new_tokens": count,
        "do_sample": False,
        "suppress_tokens": banned_tokens(model),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
