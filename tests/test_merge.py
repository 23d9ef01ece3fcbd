"""Encoder features of every family's tokens, and merging them before the projector: against loops from the formula."""

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from torch import Tensor

from saccade import SaccadeError
from saccade.dualspeed.modes import ModeConfig
from saccade.families import Encoded
from saccade.pruning import reduced_features
from saccade.reducers import Needs, PruningConfig, get_reducer, reduce
from saccade.testing import families as tester
from saccade.tokens import Reduction, VisualContext

CASES = {name: tester.Case(name, FAMILIES[name]) for name in FAMILIES}
VIDEO_CASES = {f"{name}-video": VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}
TOKEN_BY_TOKEN = [name for name, case in CASES.items() if case.family.projects_tokens]
ENCODER = Needs(frozenset({"encoder_features"}))
MERGES = [("visionzip", {"contextual": 0.5}), ("prumerge", {"neighbours": 3})]


def image_tokens(context: VisualContext) -> Tensor:
    """bool `(R, N)`, true on tokens of the picture."""
    return context.valid if context.protected is None else context.valid & ~context.protected


@torch.no_grad()
@pytest.mark.parametrize("name", [*CASES, *VIDEO_CASES])
def test_every_family_gives_encoder_features(name):
    """One vector per token, all different and zero only on newlines, and the same features as without the request."""
    case = (CASES | VIDEO_CASES)[name]
    context = case.family.encode(case.inputs, ENCODER).context
    plain = case.family.encode(case.inputs).context
    torch.testing.assert_close(context.features, plain.features)
    assert plain.encoder_features is None
    assert context.encoder_features.shape[:2] == context.shape[:2]
    rows = context.encoder_features[image_tokens(context)]
    assert (rows.norm(dim=1) > 0).all()
    assert len(rows.unique(dim=0)) > len(rows) / 2
    assert not context.encoder_features[~image_tokens(context)].any()


@torch.no_grad()
def test_llavas_are_the_hidden_states_that_the_model_reads():
    case = CASES["llava"]
    states = case.model.model.vision_tower(case.inputs["pixel_values"], output_hidden_states=True).hidden_states
    for layer, expected in ((-2, states[-2][:, 1:]), ([1, -1], torch.cat((states[1], states[-1]), dim=2)[:, 1:])):
        config, projector = case.model.config, case.family.projector
        before, first = config.vision_feature_layer, projector.linear_1
        try:
            config.vision_feature_layer = layer
            projector.linear_1 = torch.nn.Linear(expected.shape[2], first.out_features)
            found = case.family.encode(case.inputs, ENCODER).context.encoder_features
        finally:
            config.vision_feature_layer, projector.linear_1 = before, first
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_a_token_is_what_the_projector_makes_of_it_alone(name):
    case = CASES[name]
    context = case.family.encode(case.inputs, ENCODER).context
    image = image_tokens(context)
    projected = torch.stack([case.family.project(row) for row in context.encoder_features[image]])
    torch.testing.assert_close(projected, context.features[image], rtol=1e-4, atol=1e-5)


def merged_by_loop(case: tester.Case, encoded: Encoded, reduction: Reduction) -> list[list[Tensor]]:
    """For each row the tokens that stay: a merged one is the projector's of the weighted sum of encoder features."""
    context = encoded.context
    found = []
    for row, places in enumerate(reduction.index.tolist()):
        tokens = []
        for slot, place in enumerate(place for place in places if place >= 0):
            weights = {n: float(w) for n, w in enumerate(reduction.weight[row, slot]) if w != 0}
            if weights == {place: 1.0}:
                tokens.append(context.features[row, place])
                continue
            total = sum(weight * context.encoder_features[row, token] for token, weight in weights.items())
            tokens.append(case.family.project(total))
        found.append(tokens)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("reducer", "options"), MERGES)
@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_merging_before_the_projector_equals_the_loop(name, reducer, options):
    case, budget = CASES[name], PruningConfig(prune_ratio=tester.RATIO)
    before, behind = (get_reducer(reducer, merge=merge, **options) for merge in ("encoder", "projected"))
    encoded = case.family.encode(case.inputs, Needs.of(before, budget))
    reduction = reduce(encoded.context, budget, before)
    kept = reduced_features(case.family, encoded, reduction)
    expected = merged_by_loop(case, encoded, reduction)
    assert sum(map(len, expected)) == int(reduction.counts.sum())
    assert reduction.merged.any()
    assert reducer == "prumerge" or not reduction.merged.all()
    for row, tokens in enumerate(expected):
        torch.testing.assert_close(kept[row, : len(tokens)], torch.stack(tokens), rtol=1e-4, atol=1e-5)
        assert not kept[row, len(tokens) :].any()
    # The same tokens with the same weights as behind it, and other features.
    other = reduce(encoded.context, budget, behind)
    assert torch.equal(other.index, reduction.index)
    torch.testing.assert_close(other.weight, reduction.weight)
    assert not torch.allclose(reduced_features(case.family, encoded, other), kept, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("reducer", "options"), MERGES)
def test_across_the_crops_of_an_image(reducer, options):
    """A budget of an image merges across its pictures: equal to one row of all their tokens."""
    case, budget = CASES["llava_next"], PruningConfig(prune_ratio=tester.RATIO, budget="image", newlines="drop")
    chosen = get_reducer(reducer, merge="encoder", **options)
    encoded = case.family.encode(case.inputs, Needs.of(chosen, budget))
    reduction = reduce(encoded.context, budget, chosen)
    kept = reduced_features(case.family, encoded, reduction)
    context = encoded.context
    for group in context.group.unique():
        rows, tokens = (image_tokens(context) & (context.group == group).unsqueeze(1)).nonzero(as_tuple=True)
        fields = ("features", "encoder_features", "saliency", "keys")
        alone = VisualContext(**{name: getattr(context, name)[rows, tokens].unsqueeze(0) for name in fields})
        count = budget.count(int(context.valid[context.group == group].sum()))
        expected = reduced_features(case.family, Encoded(alone, {}), chosen(alone, count))[0]
        found = torch.cat([kept[row][reduction.valid[row]] for row in rows.unique()])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("reducer", "options"), MERGES)
def test_gradients_reach_projector_and_tower_through_the_merge(reducer, options):
    case, budget = tester.Case("llava", FAMILIES["llava"]), PruningConfig(prune_ratio=tester.RATIO)
    chosen = get_reducer(reducer, merge="encoder", **options)
    encoded = case.family.encode(case.inputs, Needs.of(chosen, budget))
    reduction = reduce(encoded.context, budget, chosen)
    encoder_features = encoded.context.encoder_features
    encoder_features.retain_grad()
    reduced_features(case.family, encoded, reduction)[reduction.merged].sum().backward()
    reached = encoder_features.grad.abs().sum(dim=2) > 0
    into_merged = (reduction.weight * reduction.merged.unsqueeze(2)).abs().sum(dim=1) > 0
    assert torch.equal(reached, into_merged)
    assert all(weight.grad.abs().sum() > 0 for weight in case.family.projector.parameters())
    assert case.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reducer", ["visionzip", "prumerge"])
def test_pruned_generation_and_training(reducer):
    case = tester.Case("llava_next", FAMILIES["llava_next"])
    pruned = case.prune(case.prompts(), reducer, reducer_options={"merge": "encoder"})
    options = tester.generation_options(case)
    cached, uncached = (case.model.generate(**dict(pruned), **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    step = tester.make_step(case.family, get_reducer(reducer, merge="encoder"), None)
    for mode in ("fast", "slow"):
        loss = step(mode, case.batch, 1.0).loss
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.parametrize("name", [name for name in CASES if name not in TOKEN_BY_TOKEN])
def test_a_family_that_cannot_says_so(name):
    case = CASES[name]
    message = f"model_type={case.model.config.model_type!r}: its projector .* set the reducer's option merge to"
    for reducer in ("visionzip", "prumerge"):
        with pytest.raises(SaccadeError, match=message):
            case.prune(case.inputs, reducer, reducer_options={"merge": "encoder"})
    mode = ModeConfig("fast", 1.0, pruning=PruningConfig("visionzip", {"merge": "encoder"}))
    with pytest.raises(SaccadeError, match=message):
        case.family.check_gives(mode.needs)  # before training begins
