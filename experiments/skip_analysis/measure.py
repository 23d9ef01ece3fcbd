"""What skipping feed-forward networks changes in a model, measured layer by layer and compared to a bound.

The stock model reads a laid-out prompt twice, with all feed-forward networks and without those of skipped rows.
docs/skip-vision-analysis.md derives the bound and the error of dropping keys and values.

Shapes: B samples, L rows of width D; H heads; n layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.errors import SaccadeError
from saccade.families import Family, get_family
from saccade.interfaces import changed
from saccade.pruning.cache import cache_of
from saccade.skip_vision.language import ROLES_KEYWORD
from saccade.skip_vision.rows import check_layer
from saccade.tokens import Role

GROUPS: dict[str, tuple[Role, ...]] = {
    "visual": (Role.RETAINED, Role.SKIPPED),
    "retained": (Role.RETAINED,),
    "skipped": (Role.SKIPPED,),
    "summary": (Role.SUMMARY,),
    "text": (Role.TEXT, Role.ANSWER),
}
"""The kinds of rows that are distinguished."""

TINY = 1e-30


def rows_of(roles: Tensor, group: str) -> Tensor:
    """Rows of a group of `GROUPS`: bool `(B, L)`."""
    return torch.isin(roles, torch.tensor([int(role) for role in GROUPS[group]], device=roles.device))


@torch.no_grad()
def ffn_ratio(model: nn.Module, prepared: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """How much each feed-forward network adds to each row: ||F(u)|| / ||u||, u the row after attention (Fig. 1).

    Args:
        model: a stock model that does not skip.
        prepared: the output of `SkipVision.prepare`; here all rows pass all networks.

    Returns:
        Per layer and group, the ratio of every row of the group, float32 `(M,)`.

    Raises:
        SaccadeError: if the layers do not have the structure that Skip-Vision needs.
    """
    family, inputs, roles = _sort(model, prepared)
    run = _Run(family, None)
    with run:
        model(**inputs, use_cache=False)
    ratios = [
        added.norm(dim=-1) / rows.norm(dim=-1).clamp(min=TINY)
        for added, rows in zip(run.added, run.residual, strict=True)
    ]
    return [{group: ratio[rows_of(roles, group)] for group in GROUPS} for ratio in ratios]


@torch.no_grad()
def skip_error(model: nn.Module, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What leaving out the feed-forward networks of skipped rows changes, measured and bounded.

    Norms are Euclidean over a row's channels; maxima are over all rows except padding. x are the rows of the full run,
    y those of the skipping run, and G is a full layer. With E_l = max ||y_l - x_l||, the injections
    e_l = max ||F_l(u)|| over skipped rows of the skipping run, and the gains g_l = max ||G_l(y_l) - G_l(x_l)|| / E_l:

        E_{l+1} <= g_l E_l + e_l,   hence   E_n <= sum_l e_l prod_{k>l} g_k

    Args:
        model: a stock model with any attention implementation; attention maps are read with "eager".
        prepared: the output of `SkipVision.prepare`.

    Returns:
        `layers`, each with `deviation` (a group's largest change after the layer, None for a group without rows) and
        `deviation_all`, E; `relative` (the norm of a group's changes as a share of the norm of its rows); `injection`
        e; `gain` g; `bound`; `spectral` (the bound on e from weights alone, None for other kinds of networks);
        `attention_mass` and `attention_mass_max` (attention of text after an image to skipped rows, mean and maximum
        over rows and heads); `kv_drop` (the change of that text's attention output without skipped keys and values, as
        a share of its norm). And `logits`, over text rows: `max_change`, `rms_change`, `rms`, `kl` (mean of KL(full ||
        skipping)), `same_choice` (share).

    Raises:
        SaccadeError: if no row is skipped, or the layers do not have the structure that Skip-Vision needs.
    """
    family, inputs, roles = _sort(model, prepared)
    skipped, text = rows_of(roles, "skipped"), rows_of(roles, "text")
    if not bool(skipped.any()):
        raise SaccadeError("skipped: the prompt has no skipped rows, give it an image and skip some of its tokens")
    whole, part = _Run(family, None), _Run(family, skipped)
    with whole, _eager(family):
        output = model(**inputs, use_cache=True, output_attentions=True)
    attentions, cache = output.attentions, cache_of(output)
    if attentions is None or cache is None or len(attentions) != len(whole.layers):
        raise changed(f"{type(model).__name__} gives no attention map of each layer, or no key-value cache")
    with part, _eager(family):
        logits = model(**inputs, use_cache=False).logits
    behind = text & (skipped.cumsum(dim=1) > 0)  # (B, L)
    valid = roles != Role.PADDING
    bound, before, layers = 0.0, torch.zeros_like(whole.after[0]), []
    for number, layer in enumerate(family.language_layers):
        change = part.after[number] - whole.after[number]  # (B, L, D)
        injected = part.added[number].norm(dim=-1)[skipped].max().item()
        # The full layer on the rows of the skipping run: what was left out is added back.
        moved = change + part.added[number] * skipped.unsqueeze(-1)
        size = before.norm(dim=-1)[valid].max().item()
        gain = moved.norm(dim=-1)[valid].max().item() / size if size else 0.0
        bound = gain * bound + injected
        entry: dict[str, Any] = {
            "layer": number,
            "deviation": {group: _largest(change, rows_of(roles, group)) for group in GROUPS},
            "relative": {group: _relative(change, whole.after[number], rows_of(roles, group)) for group in GROUPS},
            "deviation_all": change.norm(dim=-1)[valid].max().item(),
            "injection": injected,
            "gain": gain,
            "bound": bound,
            "spectral": spectral_bound(layer),
        }
        weights, values = attentions[number], cache.layers[number].values
        layers.append(entry | _attention(weights, values, skipped, behind))
        before = change
    return {"layers": layers, "logits": _logits(output.logits.float()[text], logits.float()[text])}


def kv_drop_error(weights: Tensor, values: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
    """The exact change of attention outputs when skipped keys and values are dropped, and their attention mass.

    With a the mass on skipped columns, o_S the weighted mean of their values and o_keep that of the others,
    o_full - o_keep = a (o_S - o_keep), since softmax over fewer columns equals the old one on them, rescaled.

    Args:
        weights: attention `(B, H, Q, L)`; each row sums to one.
        values: `(B, H or fewer, L, D)`; heads that share values are adjacent.
        skipped: bool `(B, L)`.

    Returns:
        o_full - o_keep `(B, H, Q, D)`, NaN for a row that attends to skipped columns only; and a `(B, H, Q)`.
    """
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
    on_skipped = weights * skipped[:, None, None, :]
    on_kept = weights * ~skipped[:, None, None, :]
    mass, rest = on_skipped.sum(dim=-1, keepdim=True), on_kept.sum(dim=-1, keepdim=True)
    # a o_S rather than o_S, which is undefined for rows without such columns.
    return on_skipped @ values - mass * (on_kept @ values) / rest, mass.squeeze(-1)


def spectral_bound(layer: nn.Module) -> float | None:
    """A bound on ||F(u)|| for every row u, from a decoder layer's weights alone; None for other kinds of networks.

    ||N(u)|| <= sqrt(D) max|gamma| for RMSNorm and |silu(t)| <= |t| give ||F(u)|| <= ||W_down|| ||W_gate|| ||W_up|| D
    max|gamma|^2, in spectral norms: the product of two vectors entry by entry is no longer than that of their norms.
    """
    mlp, norm = layer.mlp, getattr(layer, "post_attention_layernorm", None)
    names = ("gate_proj", "up_proj", "down_proj")
    form = all(isinstance(getattr(mlp, name, None), nn.Linear) for name in names)
    silu = isinstance(getattr(mlp, "act_fn", None), nn.SiLU) or "SiLU" in type(getattr(mlp, "act_fn", None)).__name__
    if not form or not silu or hasattr(layer, "pre_feedforward_layernorm") or norm is None:
        return None
    if any(getattr(mlp, name).bias is not None for name in names):
        return None
    size = torch.stack([torch.linalg.matrix_norm(getattr(mlp, name).weight.float(), ord=2) for name in names]).prod()
    return (size * norm.weight.numel() * norm.weight.float().abs().max() ** 2).item()


class _Run:
    """Hooks that record a forward: u, F(u) and the layer's output, float32 `(B, L, D)` for each layer.

    Args:
        skipped: bool `(B, L)`, rows whose F(u) is recorded and then left out; None for none.
    """

    def __init__(self, family: Family, skipped: Tensor | None) -> None:
        self.layers = list(family.language_layers)
        self.skipped = skipped
        self.residual: list[Tensor] = []
        self.added: list[Tensor] = []
        self.after: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Run":
        for number, layer in enumerate(self.layers):
            check_layer(number, layer)
            # If the network is followed by a norm, as in Gemma, the norm's output is what is added.
            last = getattr(layer, "post_feedforward_layernorm", None) or layer.mlp
            names = ("pre_feedforward_layernorm", "post_attention_layernorm")
            first = next((found for name in names if (found := getattr(layer, name, None)) is not None), None)
            if first is None:
                raise changed(f"{type(layer).__name__} has no {' and no '.join(map(repr, names))}")
            self._handles += [
                first.register_forward_pre_hook(lambda module, args: self.residual.append(args[0].float())),
                last.register_forward_hook(self._add),
                layer.register_forward_hook(lambda module, args, output: self.after.append(_first(output).float())),
            ]
        return self

    def __exit__(self, error: type[BaseException] | None, *about: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        counts = [len(seen) for seen in (self.residual, self.added, self.after)]
        if error is None and counts != [len(self.layers)] * 3:
            raise changed(
                f"of {len(self.layers)} decoder layers {counts[0]} called the norm before their feed-forward network, "
                f"{counts[1]} the network and {counts[2]} were called themselves"
            )

    def _add(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        self.added.append(output.float())
        return None if self.skipped is None else output.masked_fill(self.skipped.unsqueeze(-1), 0)


@contextmanager
def _eager(family: Family) -> Iterator[None]:
    """Use the attention implementation that returns its maps."""
    language: PreTrainedModel = family.language_model
    kind = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(kind)


def _sort(model: nn.Module, prepared: Mapping[str, Any]) -> tuple[Family, dict[str, Any], Tensor]:
    inputs = {name: value for name, value in prepared.items() if name not in (ROLES_KEYWORD, "labels")}
    return get_family(model), inputs, prepared[ROLES_KEYWORD]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _largest(change: Tensor, rows: Tensor) -> float | None:
    return change[rows].norm(dim=-1).max().item() if bool(rows.any()) else None


def _relative(change: Tensor, whole: Tensor, rows: Tensor) -> float | None:
    return (change[rows].norm() / whole[rows].norm().clamp(min=TINY)).item() if bool(rows.any()) else None


def _attention(weights: Tensor, values: Tensor, skipped: Tensor, behind: Tensor) -> dict[str, float | None]:
    """Attention of the rows `behind` to skipped ones; empty if a layer's window stores fewer columns."""
    if not bool(behind.any()) or values.shape[2] != skipped.shape[1]:
        return dict.fromkeys(("attention_mass", "attention_mass_max", "kv_drop"))
    error, mass = kv_drop_error(weights.float(), values.float(), skipped)
    repeated = values.float().repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
    rows = behind.unsqueeze(1).expand(mass.shape)  # (B, H, L)
    return {
        "attention_mass": mass[rows].mean().item(),
        "attention_mass_max": mass[rows].max().item(),
        "kv_drop": (error[rows].norm() / (weights.float() @ repeated)[rows].norm().clamp(min=TINY)).item(),
    }


def _logits(whole: Tensor, part: Tensor) -> dict[str, float]:
    """Compare logits `(M, V)` of text rows with all networks and with some skipped."""
    change = part - whole
    log_whole, log_part = whole.log_softmax(dim=-1), part.log_softmax(dim=-1)
    return {
        "max_change": change.abs().max().item(),
        "rms_change": change.square().mean().sqrt().item(),
        "rms": whole.square().mean().sqrt().item(),
        "kl": (log_whole.exp() * (log_whole - log_part)).sum(dim=-1).mean().item(),
        "same_choice": (whole.argmax(dim=-1) == part.argmax(dim=-1)).float().mean().item(),
    }
