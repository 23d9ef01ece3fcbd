"""What the collector reads off the vision tower and the prompt, against eager attention and plain loops."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from saccade import prune_inputs
from saccade.errors import SaccadeError
from saccade.families import get_family, vision_attention
from saccade.families.base import Encoded
from saccade.families.llava import LlavaFamily
from saccade.families.vision_attention import AttentionBlock, Patches, pool_patches
from saccade.reducers import Needs, PruningConfig, get_reducer, list_reducers
from saccade.testing.training import fast_slow_step
from saccade.tokens import VisualContext

pytestmark = pytest.mark.interfaces

ATTENTION = Needs(frozenset({"saliency", "keys"}))
DEMANDING = [name for name in list_reducers() if get_reducer(name).needs]


@pytest.fixture
def batch(collator, mixed_rows):
    return dict(collator([dict(row) for row in mixed_rows]))


@pytest.fixture
def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture
def siglip():
    """A LLaVA on a tower without a class token."""
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
    )
    text = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=31, vision_feature_select_strategy="full"
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def siglip_inputs(images: int = 2) -> dict[str, torch.Tensor]:
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, *[31] * 16, 5, 6, 7]]).expand(images, -1)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def eager_attention(model, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Attention `(R, H, P, P)` as the tower computes it itself."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    attentions = tower(pixels, output_attentions=True).attentions[layer]
    tower.set_attn_implementation("sdpa")
    return attentions


def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_class_attention_and_keys_are_the_towers_own(model, inputs):
    encoded = get_family(model).encode(inputs, ATTENTION)
    expected = eager_attention(model, inputs["pixel_values"], -2)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(encoded.context.saliency, expected)
    layer = model.model.vision_tower.encoder.layers[-2]
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-3]
    keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))[:, 1:]
    torch.testing.assert_close(encoded.context.keys, keys.unflatten(2, (4, -1)).mean(dim=2))


@pytest.mark.parametrize(("layer", "attention"), [(-2, -2), (-1, -1), (1, 0), ([0, 2], 1)])
@torch.no_grad()
def test_the_block_is_the_one_that_gives_the_features(model, inputs, layer, attention):
    model.config.vision_feature_layer = layer
    block = get_family(model).attention_block()
    assert block.attention is model.model.vision_tower.encoder.layers[attention].self_attn


@torch.no_grad()
def test_without_a_class_token_it_is_the_attention_received(siglip, monkeypatch):
    inputs = siglip_inputs()
    expected = eager_attention(siglip, inputs["pixel_values"], -2).mean(dim=(1, 2))
    for chunk in (2**25, 200, 1):
        monkeypatch.setattr(vision_attention, "CHUNK_ELEMENTS", chunk)
        context = get_family(siglip).encode(inputs, ATTENTION).context
        torch.testing.assert_close(context.saliency, expected)
    torch.testing.assert_close(context.saliency.sum(dim=1), torch.ones(2))
    assert context.keys.shape == (2, 16, 8)


@torch.no_grad()
def test_padded_patches_are_left_out():
    queries, keys = torch.randn(2, 2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    real = torch.tensor([[True, True, False, True, False, True], [True] * 6])
    saliency = vision_attention.attention_received(queries, keys, real)
    alone = vision_attention.attention_received(queries[:1, :, real[0]], keys[:1, :, real[0]])
    torch.testing.assert_close(saliency[0, real[0]], alone[0])
    assert not saliency[0, ~real[0]].any()
    additive = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(2, 1, 6, 6)
    for mask in (additive, additive == 0, real, real.long()):
        assert torch.equal(vision_attention._real_patches(mask, keys), real)


@torch.no_grad()
@pytest.mark.parametrize("grid", [[[1, 4, 4], [1, 4, 4]], [[1, 4, 6], [2, 2, 4]]])
def test_packed_images_and_rotary_positions(grid, monkeypatch):
    weights = []

    def probe(module, query, key, value, attention_mask, scaling, **kwargs):
        attention = (query @ key.transpose(2, 3) * scaling).softmax(dim=3)
        weights.append(attention.mean(dim=(1, 2)).flatten())
        return (attention @ value).transpose(1, 2), None

    AttentionInterface.register("saccade_probe", probe)
    config = Qwen2VLConfig().vision_config
    for name, value in {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 16, "patch_size": 2}.items():
        setattr(config, name, value)
    config._attn_implementation = "saccade_probe"
    torch.manual_seed(0)
    tower = Qwen2VisionTransformerPretrainedModel(config).eval()
    attention = tower.blocks[-1].attn
    block = AttentionBlock(attention, attention.qkv, attention.qkv, heads=2, class_token=False)
    grid = torch.tensor(grid)
    patches = int(grid.prod(dim=1).sum())
    with vision_attention.watching(block) as calls:
        tower(torch.randn(patches, 3 * 2 * 2 * 2), grid)
    (call,) = calls
    values = vision_attention.read_attention(call, block, ATTENTION.fields)
    segments = int(grid[:, 0].sum())
    torch.testing.assert_close(values["saliency"].flatten(), torch.cat(weights[-segments:]))
    assert values["keys"].shape == (1, patches, 16)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[[8, 12], [8, 12]], [[8, 16], [12, 8]]])
def test_images_packed_behind_a_mask(sizes):
    config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    tower = PixtralVisionModel(config).eval()
    block = vision_attention.encoder_block(tower, -2)
    pixels, sizes = torch.randn(2, 3, 16, 16), torch.tensor(sizes)
    with vision_attention.watching(block) as calls:
        tower(pixels, image_sizes=sizes)
    values = vision_attention.read_attention(*calls, block, ATTENTION.fields)
    tower.set_attn_implementation("eager")
    (attention,) = tower(pixels, image_sizes=sizes, output_attentions=True).attentions[0]
    lengths = (sizes // 4).prod(dim=1).tolist()
    starts = [0, lengths[0]]
    images = [attention[:, start : start + n, start : start + n] for start, n in zip(starts, lengths, strict=True)]
    expected = torch.cat([image.mean(dim=(0, 1)) for image in images])
    torch.testing.assert_close(values["saliency"].flatten(), expected)
    # As FlashAttention is told of the images.
    borders = torch.tensor([0, *lengths]).cumsum(dim=0)
    calls[0].given |= {"attention_mask": None, "cu_seq_lens_q": borders}
    again = vision_attention.read_attention(*calls, block, ATTENTION.fields)
    assert torch.equal(again["saliency"], values["saliency"])


def test_blocks_of_patches_are_averaged():
    encoded = Encoded(VisualContext(torch.zeros(2, 6, 4), grid=torch.tensor([[1, 2, 3]] * 2)), {})
    raster = torch.arange(2 * 4 * 6.0).reshape(2, 24, 1)
    pooled = pool_patches([Patches(raster[:1], False), Patches(raster[1:], False)], encoded)
    expected = torch.nn.functional.avg_pool2d(raster.reshape(2, 1, 4, 6), 2).flatten(2).mT
    torch.testing.assert_close(pooled, expected)
    with_class = torch.cat((torch.full((2, 1, 1), 99.0), raster), dim=1)
    torch.testing.assert_close(pool_patches([Patches(with_class, True)], encoded), expected)
    with pytest.raises(ValueError, match="2 x 23 patches do not pool"):
        pool_patches([Patches(raster[:, 1:], False)], encoded)


def test_features_are_the_same_and_nothing_stays_behind(model, inputs):
    family = get_family(model)
    plain = family.encode(inputs)
    before = hook_count(model)  # transformers hangs its own hooks in at the first call, for good
    asked = family.encode(inputs, ATTENTION | Needs(frozenset({"relevance", "encoder_features"})))
    assert torch.equal(asked.context.features, plain.context.features)
    assert hook_count(model) == before
    for name in ("saliency", "keys", "relevance"):
        assert getattr(plain.context, name) is None
        assert not getattr(asked.context, name).requires_grad
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :3]
    with pytest.raises((ValueError, RuntimeError)):
        family.encode(inputs, ATTENTION)
    assert hook_count(model) == before


def test_nothing_is_hooked_for_a_reducer_without_needs(model, inputs, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("hooked")

    family = get_family(model)
    family.encode(inputs)  # transformers' own hooks
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", refuse)
    family.encode(inputs, Needs.of(get_reducer("divprune"), PruningConfig()))
    family.encode(inputs, Needs.of(get_reducer("cdpruner"), PruningConfig()))  # relevance needs no hook either
    with pytest.raises(AssertionError, match="hooked"):
        family.encode(inputs, Needs.of(get_reducer("fastervlm"), PruningConfig()))


def test_under_peft_checkpointing_and_autocast(model, inputs):
    reference = get_family(model).encode(inputs, ATTENTION).context
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*(q_proj|k_proj)", r=2))
    wrapped.train()
    stock = wrapped.get_base_model()
    enable = getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    family = get_family(wrapped)
    assert isinstance(family, LlavaFamily)

    def gradients(needs: Needs) -> tuple[VisualContext, dict[str, torch.Tensor]]:
        wrapped.zero_grad()
        context = family.encode(inputs, needs).context
        context.features.square().sum().backward()
        return context, {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}

    _, plain = gradients(Needs())
    context, asked = gradients(ATTENTION)
    assert plain
    assert all(torch.equal(plain[name], asked[name]) for name in plain | asked)
    torch.testing.assert_close(context.saliency, reference.saliency)  # a new adapter changes nothing yet
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = family.encode(inputs, ATTENTION).context
    assert narrow.saliency.dtype == narrow.keys.dtype == torch.float32
    torch.testing.assert_close(narrow.saliency, reference.saliency, rtol=0.05, atol=1e-3)


def test_a_tower_without_a_known_block_is_refused(model, inputs):
    model.model.vision_tower.config.model_type = "another"
    model.model.vision_tower.config.num_hidden_layers += 1  # no module list has this many blocks
    with pytest.raises(SaccadeError, match=r"model_type='llava' of transformers .* gives no keys and saliency"):
        get_family(model).encode(inputs, ATTENTION)


@pytest.mark.parametrize("name", DEMANDING)
def test_every_reducer_gets_what_it_needs_in_training_and_inference(name, model, batch, inputs):
    pruned = prune_inputs(model, inputs, reducer=name, prune_ratio=0.9)
    assert model.generate(**pruned, max_new_tokens=3, do_sample=False).shape[0] == inputs["input_ids"].shape[0]
    step = fast_slow_step(model, name)
    for mode in ("fast", "slow"):
        output = step(mode, batch, 10.0)
        assert torch.isfinite(output.loss)
        output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in get_family(model).projector.parameters())
