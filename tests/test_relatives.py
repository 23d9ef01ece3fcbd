"""The invariants on the families that other tests leave out, with one reducer; with all of them in the slow tests."""

import copy

import pytest
import torch
from datasets import Dataset
from family_models import RELATIVES, build_qwen
from helpers import ORDINARY
from PIL import Image
from skip_tester import masked_ffn, options_for, skipping, without_roles

from saccade import prune_inputs
from saccade.dualspeed import DualSpeedTrainer
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.families.encoded import Patches
from saccade.reducers import PruningConfig, list_reducers
from saccade.skip_vision import apply_skip_vision
from saccade.testing import families as tester
from saccade.testing.tiny_models import WIDTH, Tiny, mixed_rows
from saccade.testing.training import make_config
from saccade.tokens import Role

CASES = {name: tester.Case(name, tiny) for name, tiny in RELATIVES.items()}
TWINS = ("glm46v",)
"""Models whose code is that of another one here, under another name."""
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")
EXPERTS = {"qwen3_vl_moe": 0, "glm4v_moe": 1}
"""The number of a layer with experts."""


def pairs(every_twin):
    """Each model and reducer; those with another reducer than one, and twins unless wanted, are slow."""
    return [
        pytest.param(name, reducer, marks=[] if reducer == "divprune" and whole else pytest.mark.slow)
        for name in RELATIVES
        for whole in [every_twin or name not in TWINS]
        for reducer in list_reducers()
        if reducer != "none"
    ]


ROUNDS_BY_BATCH = ("mistral3", "random", "one by one")
"""The tower attends to all images of a batch in one sequence, so the last bits of features depend on the batch, and
`random` draws by the bits."""
CORE = ("ratio zero", "original positions", "several sequences")
"""What is tested of twins, too, in the fast tests."""


@pytest.mark.parametrize(
    ("name", "reducer", "check"),
    [
        pytest.param(*pair.values, check, marks=pair.marks)
        for check in tester.CHECKS
        for pair in pairs(every_twin=check in CORE)
        if (*pair.values, check) != ROUNDS_BY_BATCH
    ],
)
def test_invariant(name, reducer, check):
    tester.CHECKS[check](CASES[name], reducer)


@pytest.mark.parametrize("name", RELATIVES)
def test_generation_at_ratio_zero(name):
    tester.check_generation_at_ratio_zero(CASES[name])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("name", "reducer"), pairs(every_twin=False))
def test_training(name, reducer, lora, tmp_path):
    tester.check_training(CASES[name], reducer, tmp_path, lora)


@pytest.mark.parametrize("name", RELATIVES)
def test_merging_and_saliency(name):
    """A reducer that merges, and one that reads the tower's attention."""
    tester.check_original_equals_masked(CASES[name], "avgpool")
    tester.check_original_equals_masked(CASES[name], "visionzip")


@pytest.mark.parametrize("name", RELATIVES)
def test_a_step_without_images_reaches_every_parameter(name):
    tester.check_step_without_images(CASES[name])


@pytest.mark.parametrize("name", RELATIVES)
def test_parts_train_as_the_whole(name):
    tester.check_in_parts(CASES[name], "divprune")


@pytest.mark.parametrize("name", RECURRENT)
def test_what_recurrent_layers_cannot_do_is_refused(name):
    assert CASES[name].family.recurrent
    with pytest.raises(SaccadeError, match=f"padding_free=True: model_type='{name}'"):
        tester.check_padding_free(CASES[name], "divprune")
    with pytest.raises(SaccadeError, match=f"model_type='{name}': layers of its language model carry a state"):
        apply_skip_vision(CASES[name].model, split="divprune")


def test_lines_with_text_between_them_cannot_skip():
    """Counts are per image, and each line would be laid out by itself."""
    with pytest.raises(SaccadeError, match="model_type='mistral3': text stands after each line"):
        apply_skip_vision(CASES["mistral3"].model, split="divprune")


def test_without_recurrent_layers_original_positions_equal_masking():
    """What a dropped token leaves behind in Qwen3.5 is due to its linear attention alone."""
    tiny = Tiny(lambda: build_qwen("3_5", layer_types=["full_attention"] * 2), RELATIVES["qwen3_5"].model_class)
    case = tester.Case("qwen3_5", tiny)
    assert not case.family.recurrent
    tester.check_original_equals_masked(case, "divprune")


@torch.no_grad()
def test_scores_of_mistrals_patches_stand_with_their_tokens():
    """Each patch is given the number of the token that the model makes of it, and each token gets its own back."""
    case = CASES["mistral3"]
    encoded = case.family.encode(case.inputs)
    patches, expected = [], []
    for _, height, width in encoded.context.grid.tolist():
        number = torch.arange(1.0, height * width + 1)
        square = number.reshape(height, width).repeat_interleave(2, 0).repeat_interleave(2, 1)
        merged = torch.nn.functional.unfold(square[None, None], kernel_size=2, stride=2)  # as in the model's merger
        assert torch.equal(merged[0], number.expand(4, -1))
        patches.append(square.flatten())
        expected.append(number)
    got = case.family.patches_to_tokens([Patches(torch.cat(patches)[None, :, None], False)], encoded, case.inputs)
    assert torch.equal(got[encoded.context.valid].flatten(), torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["divprune", "vispruner", "cdpruner"])
def test_an_image_that_is_a_single_token_is_encoded_as_beside_others(reducer):
    """By the tower and merger of Mistral 3, which fail on it alone."""
    model, processor = RELATIVES["mistral3"].build()
    family = get_family(model)
    images = [Image.new("RGB", (side, side), (99, 9, 3)) for side in (4, 16)]
    alone, beside = (processor(images=images[:count], text=["[IMG]" * count], return_tensors="pt") for count in (1, 2))
    assert family.encode(alone).context.shape[:2] == (1, 1)
    features = [family.encode(inputs).context.features[0, 0] for inputs in (alone, beside)]
    torch.testing.assert_close(*features)
    assert model(**prune_inputs(model, alone, PruningConfig(reducer=reducer))).logits.isfinite().all()


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_run_on_tokens_that_do_not_skip(name):
    """Skip-Vision's feed-forward network may be a router and its experts: neither sees a skipped token."""
    case = CASES[name]
    routed = []
    with skipping(case.model, options_for(case.name)) as skip:
        prepared = skip.prepare(case.inputs)
        gate = skip.family.language_layers[EXPERTS[name]].mlp.gate
        handle = gate.register_forward_pre_hook(lambda module, args: routed.append(args[0].numel() // WIDTH))
        got = tester.logits(case.model, prepared)
        handle.remove()
    inputs, roles = without_roles(prepared)
    skipped = roles == Role.SKIPPED
    assert skipped.any()
    assert routed == [int((~skipped).sum())]
    with masked_ffn(case.model, skipped):
        expected = tester.logits(case.model, inputs)
    seen = ~skipped & (roles != Role.PADDING)
    torch.testing.assert_close(got[seen], expected[seen], **tester.CLOSE)


@pytest.mark.parametrize("name", EXPERTS)
def test_no_step_has_a_term_that_balances_experts(name, tmp_path):
    """TRL adds one to stock steps, with the coefficient in the model's config, and no other step has one."""
    losses = []
    for number, options in enumerate(({}, {"slow_micro_batch_size": 4})):
        model = copy.deepcopy(CASES[name].model)
        model.config.text_config.router_aux_loss_coef = 1.0
        args = make_config(tmp_path / str(number), max_steps=1, **ORDINARY, **options)
        rows = Dataset.from_list(mixed_rows())
        trainer = DualSpeedTrainer(model, args=args, train_dataset=rows, processing_class=CASES[name].processor)
        assert trainer.is_ordinary == (not options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    torch.testing.assert_close(*map(torch.tensor, losses), **tester.CLOSE)
