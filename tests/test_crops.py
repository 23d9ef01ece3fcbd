"""What only Ovis 2 and LFM2-VL have: crops with a marker between them, and scores of merged patches."""

import pytest
import torch
from family_models import RELATIVES
from skip_tester import masked_ffn, options_for, skipping, without_roles

from saccade.errors import SaccadeError
from saccade.evaluation.digits import collate_prompts
from saccade.families.base import images_of_crops
from saccade.families.cache import FeatureCache
from saccade.pruning import prune_inputs
from saccade.reducers import Needs
from saccade.testing import families as tester
from saccade.testing.tiny_models import noise_image
from saccade.tokens import Role

CASES = {name: tester.Case(name, RELATIVES[name]) for name in ("ovis2", "lfm2_vl")}
FEATURES = Needs(frozenset({"encoder_features", "saliency", "keys"}))


def encoded(case, *contents):
    """The context of samples, each a question of images and words."""
    rows = [
        {"images": images, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "7"}]}
        for text, images in contents
    ]
    inputs = collate_prompts(case.processor, rows)
    with torch.no_grad():
        return case.family.encode(inputs).context


@pytest.mark.parametrize("name", CASES)
def test_crops_are_of_their_image(name):
    """Images that follow one another, also from one sample to the next, are not taken for one."""
    small, big = noise_image(16, 16, 1), noise_image(32, 32, 2)
    texts = [("<image><image>", [big, small]), ("<image><image> how many ?", [small, big]), ("<image>", [big])]
    sizes = torch.bincount(encoded(CASES[name], *texts).group)
    assert sizes.tolist() == [5, 1, 1, 5, 5]


def test_a_marker_and_no_more_stands_between_crops():
    placeholder = torch.tensor([[True, True, False, True, False, False, True]])
    assert images_of_crops(placeholder, [2, 1, 1]).tolist() == [0, 0, 1]
    assert images_of_crops(placeholder, [2, 1]) is None


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_values_of_patches_stand_with_their_tokens(name):
    """The tower's output and its attention, as means over the patches of each token, found by a loop."""
    case = CASES[name]
    context = case.family.encode(case.inputs, FEATURES).context
    tower, given = case.family.vision_tower, {key: case.inputs[key] for key in case.family.vision_inputs}
    block = case.family.attention_block().attention
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    case.model.set_attn_implementation("eager")
    states = tower(**given).last_hidden_state
    handle.remove()
    case.model.set_attn_implementation("sdpa")
    attention = seen[0].mean(dim=1)
    for number, (_, height, width) in enumerate(context.grid.tolist()):
        real = 4 * height * width
        received = attention[number, :real, :real].mean(dim=0).unflatten(0, (2 * height, 2 * width))
        state = states[number, :real].unflatten(0, (2 * height, 2 * width))
        row = context.valid[number]
        for line in range(height):
            for column in range(width):
                token = line * width + column
                block = slice(2 * line, 2 * line + 2), slice(2 * column, 2 * column + 2)
                assert row[token]
                torch.testing.assert_close(context.saliency[number, token], received[block].mean())
                found = context.encoder_features[number, token]
                if name == "lfm2_vl":
                    torch.testing.assert_close(found, state[block].mean(dim=(0, 1)))
                else:
                    torch.testing.assert_close(found, state[block].flatten())


@torch.no_grad()
def test_a_token_of_ovis_is_what_the_visual_vocabulary_makes_of_it_alone():
    case = CASES["ovis2"]
    context = case.family.encode(case.inputs, FEATURES).context
    torch.testing.assert_close(case.family.project(context.encoder_features), context.features)
    merging = {"reducer": "visionzip", "reducer_options": {"merge": "encoder"}}
    pruned = prune_inputs(case.model, case.inputs, prune_ratio=0.5, **merging)
    assert tester.logits(case.model, pruned).isfinite().all()
    config = case.model.config.vision_config
    config.tokenize_function = "st_argmax"
    try:
        with pytest.raises(SaccadeError, match="model_type='ovis2': its projector does not take tokens one by one"):
            prune_inputs(case.model, case.inputs, **merging)
    finally:
        config.tokenize_function = "softmax"


@torch.no_grad()
def test_the_markers_of_ovis_keep_their_embeddings():
    """They come from the visual vocabulary, also in a pruned sequence: another table, other answers."""
    case = CASES["ovis2"]
    pruned = prune_inputs(case.model, case.inputs, prune_ratio=0.5)
    before = tester.logits(case.model, pruned)
    table = case.model.model.visual_embeddings_table.weight
    kept = table[-5:].clone()
    table[-5:] += 1
    try:
        after = tester.logits(case.model, prune_inputs(case.model, case.inputs, prune_ratio=0.5))
    finally:
        table[-5:] = kept
    assert not torch.allclose(after, before)


@torch.no_grad()
def test_features_of_ovis_are_cached(tmp_path):
    case = CASES["ovis2"]
    case.family.vision_tower.requires_grad_(False)
    cache = FeatureCache(case.family, tmp_path, 2**24)
    plain = case.family.encode(case.inputs).context.features
    for _ in range(2):
        with cache.serving():
            assert torch.equal(case.family.encode(case.inputs).context.features, plain)
    assert cache.read_rows == len(plain)
    case.family.vision_tower.requires_grad_(True)


def test_skipped_tokens_of_ovis_are_those_of_masked_feed_forward_networks():
    case = CASES["ovis2"]
    with skipping(case.model, options_for(case.name)) as skip:
        prepared = skip.prepare(case.inputs)
        got = tester.logits(case.model, prepared)
    inputs, roles = without_roles(prepared)
    assert (roles == Role.SKIPPED).any()
    with masked_ffn(case.model, roles == Role.SKIPPED):
        expected = tester.logits(case.model, inputs)
    seen = (roles != Role.SKIPPED) & (roles != Role.PADDING)
    torch.testing.assert_close(got[seen], expected[seen], **tester.CLOSE)
