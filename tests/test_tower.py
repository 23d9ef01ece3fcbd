"""The tower stops at the layer that is used: its output does not change, and later layers do not run."""

import pytest
import torch
from family_models import FAMILIES

from saccade.families import get_family
from saccade.families.tower import unused_layers_passed_over
from saccade.testing.families import Case

pytestmark = pytest.mark.interfaces


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("feature_layer", [-1, -2, 1, [1, 2], [0]])
def test_features_are_the_stock_models(name, feature_layer):
    case = Case(name, FAMILIES[name])
    model = case.model
    layers = model.base_model.vision_tower.encoder.layers
    model.config.vision_feature_layer = feature_layer
    if isinstance(feature_layer, list):
        width = model.config.vision_config.hidden_size
        model.base_model.multi_modal_projector.linear_1 = torch.nn.Linear(
            width * len(feature_layer), model.base_model.multi_modal_projector.linear_1.out_features
        )
    inputs = {key: value for key, value in case.inputs.items() if key in ("pixel_values", "image_sizes")}
    expected = model.get_image_features(**inputs, return_dict=True).pooler_output
    ran = []
    attention = [
        layer.self_attn.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)
    ]
    with torch.no_grad():
        outputs = get_family(model).encode(case.inputs).outputs["image"].pooler_output
    for handle in attention:
        handle.remove()
    for image, stock in zip(outputs, expected, strict=True):
        assert torch.equal(image, stock)
    numbers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    used = max(number % (len(layers) + 1) for number in numbers)
    assert ran == list(range(used))
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_a_forward_of_ones_own_is_put_back(model):
    tower = model.model.vision_tower
    last = tower.encoder.layers[-1]
    own = last.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with unused_layers_passed_over(tower, -2):
        assert last.forward is not own
    assert last.forward is own
