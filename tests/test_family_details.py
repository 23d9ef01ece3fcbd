"""What single families do beyond the shared invariants: isolator rows, newlines, positions, the order of scores."""

import copy
from dataclasses import replace

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from peft import LoraConfig, get_peft_model
from torch import nn

from saccade import SaccadeError
from saccade.families import stock_model
from saccade.families.vision_attention import Patches
from saccade.pruning import ModeIsolator
from saccade.reducers import PruningConfig, get_reducer, keep_count, reduce
from saccade.testing.families import Case
from saccade.tokens import VisualContext

CASES = {name: Case(name, tiny) for name, tiny in FAMILIES.items()}
VIDEO_CASES = {name: VideoCase(name, FAMILIES[name]) for name in WITH_VIDEO}
EVERY_CASE = [*CASES.values(), *VIDEO_CASES.values()]
NAMES = [*CASES, *(f"{name}-video" for name in VIDEO_CASES)]
SEVERAL_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ANYRES = ("llava_next", "llava_onevision")


@pytest.mark.parametrize("case", EVERY_CASE, ids=NAMES)
def test_isolator_rows_stand_once_before_an_image_or_video(case):
    isolator = ModeIsolator(3, case.model.config.get_text_config().hidden_size)
    with_rows, without = (case.prune(case.inputs, "uniform", isolator=rows) for rows in (isolator, None))
    count, plain = (int(case.family.placeholder(pruned["input_ids"]).sum()) for pruned in (with_rows, without))
    # One, two, none, one image; with videos one, two, none, two.
    assert count - plain == 3 * (5 if isinstance(case, VideoCase) else 4)


def test_the_stock_model_is_found_inside_of_wrappers():
    model = copy.deepcopy(CASES["llava_next"].model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    for outer in (model, adapted, nn.DataParallel(model), nn.DataParallel(torch.compile(adapted))):
        assert stock_model(outer) is model
        assert stock_model(torch.compile(outer)) is model


@pytest.mark.parametrize("case", EVERY_CASE, ids=NAMES)
def test_every_token_but_visual_ones_stays(case):
    pruned = case.prune(case.inputs, "uniform", padding_side="right")
    for row, mask, old, old_mask in zip(
        pruned["input_ids"],
        pruned["attention_mask"],
        case.inputs["input_ids"],
        case.inputs["attention_mask"],
        strict=True,
    ):
        row, old = row[mask.bool()], old[old_mask.bool()]
        assert torch.equal(row[~case.family.placeholder(row)], old[~case.family.placeholder(old)])


@pytest.mark.parametrize("case", EVERY_CASE, ids=NAMES)
def test_wrong_number_of_placeholders(case):
    inputs = dict(case.inputs)
    first = case.family.placeholder(inputs["input_ids"][0]).nonzero()[0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, first] = 3
    with pytest.raises(SaccadeError, match="placeholders stand for"):
        case.prune(inputs, "uniform")


@pytest.mark.parametrize("case", EVERY_CASE, ids=NAMES)
def test_batch_without_images_passes_through(case):
    inputs = case.prompts([2])
    pruned = case.prune(inputs, "uniform")
    assert pruned.keys() >= {"input_ids", "attention_mask", "position_ids"}
    assert torch.equal(pruned["input_ids"], inputs["input_ids"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    again = {name: pruned[name] for name in (*text, "position_ids")}
    assert torch.equal(case.model.generate(**again, **options), case.model.generate(**text, **options))


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_compact_means_gathered_where_positions_have_several_axes(name):
    case = CASES[name]
    compact, original = (case.prune(case.inputs, "uniform", positions=mode) for mode in ("compact", "original"))
    assert compact["position_ids"].shape[0] == 3
    assert torch.equal(compact["position_ids"], original["position_ids"])


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_positions_need_the_token_types(name):
    inputs = {key: value for key, value in CASES[name].inputs.items() if key != "mm_token_type_ids"}
    with pytest.raises(SaccadeError, match="inputs has no 'mm_token_type_ids'"):
        CASES[name].prune(inputs, "uniform")


@pytest.mark.parametrize("name", ANYRES)
def test_newlines_are_kept_within_the_budget_or_dropped(name):
    case = CASES[name]
    context = case.family.encode(case.inputs).context
    newlines = context.protected & context.valid
    sizes, count = context.valid.sum(1).tolist(), newlines.sum(1)
    budget = torch.tensor([keep_count(size, 0.5) for size in sizes])
    for reducer in ("divprune", "avgpool"):
        kept = reduce(context, PruningConfig(reducer, prune_ratio=0.5))
        dropped = reduce(context, PruningConfig(reducer, prune_ratio=0.5, newlines="drop"))
        assert torch.equal(kept.counts, torch.maximum(budget, count + 1))
        assert torch.equal(dropped.counts, torch.minimum(budget, torch.tensor(sizes) - count))
        for reduction, share in ((kept, 1), (dropped, 0)):
            found = torch.zeros(context.shape[0], context.shape[1] + 1, dtype=torch.bool)
            found.scatter_(1, torch.where(reduction.valid, reduction.index, context.shape[1]), True)
            assert torch.equal(found[:, :-1] & newlines, newlines if share else torch.zeros_like(newlines))
    with pytest.raises(SaccadeError, match="newlines='most' is unknown: use one of keep, drop"):
        case.prune(case.inputs, "uniform", newlines="most")
    assert case.prune(case.inputs, "uniform", newlines="drop")["input_ids"].shape[0] == 4


def test_protected_tokens_pass_a_merge_unchanged():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 9, 4, generator=generator)
    protected = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0, 1], [0] * 8 + [1]]).bool()
    valid = torch.tensor([[1] * 9, [1] * 5 + [0] * 3 + [1]]).bool()
    context = VisualContext(features=features, valid=valid, protected=protected)
    reduction = reduce(context, PruningConfig("avgpool", prune_ratio=0.5))
    merged = reduction.apply(features)
    plain = replace(context, valid=valid & ~protected, protected=None)
    expected = get_reducer("avgpool")(plain, keep=torch.tensor([2, 2]))
    for row in range(2):
        tokens = {int(place): features[row, place] for place in protected[row].nonzero().flatten()}
        tokens |= dict(zip(expected.index[row].tolist(), expected.apply(features)[row], strict=True))
        assert reduction.index[row][reduction.valid[row]].tolist() == sorted(tokens)
        torch.testing.assert_close(merged[row][reduction.valid[row]], torch.stack([tokens[i] for i in sorted(tokens)]))


@pytest.mark.parametrize("name", SEVERAL_AXES)
@pytest.mark.parametrize("cases", [CASES, VIDEO_CASES], ids=["images", "videos"])
def test_scores_of_merged_patches_stand_with_their_tokens(cases, name):
    """The merger's outputs, given to each of their patches in the tower's order, come back as the features."""
    case = cases[name]
    visual = case.model.model.visual
    merged = []
    handle = visual.merger.register_forward_hook(lambda module, args, output: merged.append(output.detach()))
    with torch.no_grad():
        encoded = case.family.encode(case.inputs)
    handle.remove()
    unit = visual.spatial_merge_size**2
    patches = [Patches(output.repeat_interleave(unit, dim=0).unsqueeze(0), False) for output in merged]
    got = case.family.patches_to_tokens(patches, encoded, case.inputs)
    torch.testing.assert_close(got, encoded.context.features)


@pytest.mark.parametrize("case", [*map(CASES.get, ANYRES), VIDEO_CASES["llava_onevision"]], ids=[*ANYRES, "video"])
def test_scores_of_crops_stand_with_their_tokens(case):
    """The projector's outputs, packed, come back as the features, with zeros for newlines."""
    outputs = []
    handle = case.model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: outputs.append(output.detach())
    )
    with torch.no_grad():
        encoded = case.family.encode(case.inputs)
    handle.remove()
    got = case.family.patches_to_tokens([Patches(output, False) for output in outputs], encoded, case.inputs)
    context = encoded.context
    torch.testing.assert_close(got, context.features.masked_fill(context.protected.unsqueeze(2), 0))


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm", "gemma3"])
def test_scores_of_shuffled_patches_stand_with_their_tokens(name):
    """Each patch is given the number of the token that the model makes of it, and each token gets its own back."""
    case = CASES[name]
    with torch.no_grad():
        encoded = case.family.encode(case.inputs)
    rows, tokens, _ = encoded.context.shape
    _, height, width = encoded.context.grid[0].tolist()
    number = torch.arange(float(tokens)).reshape(height, width)
    patches = number.repeat_interleave(2, 0).repeat_interleave(2, 1)  # (2h, 2w)
    if name == "internvl":
        shuffled = case.model.model.pixel_shuffle(patches[None, :, :, None], scale_factor=0.5).reshape(tokens, 4)
    elif name == "gemma3":
        shuffled = case.model.model.multi_modal_projector.avg_pool(patches[None]).reshape(tokens, 1)
    else:
        shuffled = case.model.model.connector.pixel_shuffle(patches.reshape(1, -1, 1), 2).reshape(tokens, 4)
    assert torch.equal(shuffled, number.reshape(tokens, 1).expand_as(shuffled))
    block = case.family.attention_block()
    values = patches.reshape(1, -1, 1).expand(rows, -1, 1)
    if block.class_token:
        values = torch.nn.functional.pad(values, (0, 0, 1, 0), value=-1.0)
    got = case.family.patches_to_tokens([Patches(values, block.class_token)], encoded, case.inputs)
    assert torch.equal(got[:, :, 0], number.reshape(1, -1).expand(rows, -1))


def test_an_image_of_idefics_ends_with_its_thumbnail():
    case = CASES["idefics3"]
    group = case.family.encode(case.inputs).context.group
    # 32 x 16 px are cut into 2 x 1 crops and a thumbnail, the square and the upright ones into 2 x 2 and 2 x 1.
    assert group.bincount().tolist() == [3, 5, 3, 5]
    assert (group.diff() >= 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_the_tower_leaves_the_projector(name):
    family = CASES[name].family
    tower = {id(parameter) for parameter in family.vision_tower.parameters()}
    projector = {id(parameter) for parameter in family.projector.parameters()}
    language = {id(parameter) for parameter in family.language_model.parameters()}
    assert tower
    assert projector
    assert not tower & projector
    assert not language & (tower | projector)
    everything = {id(parameter) for parameter in family.model.parameters()}
    head = {id(parameter) for parameter in family.model.get_output_embeddings().parameters()}
    newline = {id(parameter) for key, parameter in family.model.named_parameters() if key.endswith("image_newline")}
    assert everything == tower | projector | language | head | newline
