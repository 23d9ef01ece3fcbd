"""Every hook and patch raises an error if a release renames, moves or removes what it relies on.

Each test changes one thing in a stock model, as a release would, and asks for an error that names the version.
"""

import copy
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from family_models import FAMILIES
from helpers import frozen_family
from skip_tester import greedy_options, options_for, skipping, with_cache
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import SFTTrainer

from benchmarks import generation
from benchmarks.steps import _watched
from experiments.skip_analysis import measure as analysis
from saccade import SaccadeError
from saccade.dualspeed import packing
from saccade.dualspeed.callbacks import SigtermCheckpoint
from saccade.dualspeed.engines import redirect_forward
from saccade.dualspeed.trainer import REPLACED, DualSpeedTrainer
from saccade.families import get_family
from saccade.families.cache import FeatureCache
from saccade.interfaces import TESTED, changed, check_methods, check_takes, is_tested, known_range
from saccade.pruning.cache import cache_of
from saccade.reducers import Needs, PruningConfig
from saccade.skip_vision import SkipVisionConfig, apply_skip_vision
from saccade.skip_vision.cache import CACHE_NAMES, cache_name, stored_length
from saccade.testing import families as tester
from saccade.tokens import Role

pytestmark = pytest.mark.interfaces

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.escape(f"transformers {transformers.__version__}: ")
TOLD = rf"^{VERSION}.*install transformers 5\.\d+ to 5\.\d+, with which it is tested$"
"""What such an error says, in one line."""


@pytest.fixture
def case():
    return tester.Case("llava", FAMILIES["llava"])


@contextmanager
def calls_changed(module: nn.Module, change: Callable[[dict], object]) -> Iterator[None]:
    """The module with `change` done to the keyword arguments of each of its calls."""
    stock = module.forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        change(kwargs)
        return stock(*args, **kwargs)

    before = module.__dict__.get("forward")
    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def signature_of(*names: str) -> inspect.Signature:
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])


class Renamed(nn.Module):
    """What `cache` and `past_key_values` may be called next."""

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, memory=None):
        return memory


# What is tested


@pytest.mark.parametrize(
    ("found", "expected"),
    [("5.19.0", True), ("5.24.3", True), ("5.18.0", False), ("5.25.0", False), ("5.24rc1", True), ("6.0", False)],
)
def test_a_version_is_tested_by_its_minor_release(found, expected):
    assert is_tested("transformers", found) is expected


def test_builds_of_a_version_count_as_it():
    assert is_tested("torch", "2.13.0+cpu")
    assert is_tested("torch", "2.13.1+cu130")
    assert not is_tested("torch", "unknown")


def test_what_is_installed_here_is_tested():
    assert is_tested("transformers", transformers.__version__)
    assert is_tested("torch", torch.__version__)


def test_the_ranges_are_those_that_the_tests_run_on():
    """The newest release of each is pinned in constraints.txt, the oldest in requirements-oldest.txt."""
    pins = {}
    for name in ("constraints.txt", "requirements-oldest.txt"):
        lines = (line.partition("==") for line in (ROOT / name).read_text().splitlines())
        pins[name] = {package: ".".join(found.split(".")[:2]) for package, _, found in lines if found}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["train"]
    for package, (oldest, newest) in TESTED.items():
        assert pins["constraints.txt"][package] == newest
        assert pins["requirements-oldest.txt"].get(package, newest) == oldest
        (requirement,) = (entry for entry in declared if re.match(rf"{package}\W", entry))
        major, minor = newest.split(".")
        # A newer torch is installed by many and rarely breaks anything; `saccade env` says that it is untested.
        above = "" if package == "torch" else f",<{major}.{int(minor) + 1}"
        assert requirement == f"{package}>={oldest}{above}"


def test_the_error_names_package_version_and_ways_out():
    assert re.match(TOLD, str(changed("forward takes no 'x'")))
    assert known_range("trl") == "1.16"
    with pytest.raises(SaccadeError, match=rf"{VERSION}Renamed.forward takes no 'cache' and no 'other'"):
        check_takes(Renamed.forward, ("input_ids", "cache", "other"))
    with pytest.raises(SaccadeError, match="SFTTrainer has no method '_renamed'"):
        check_methods(SFTTrainer, ("log", "_renamed"), "transformers")


# Encoded features


def test_a_forward_that_takes_no_encoded_features_is_refused(case, monkeypatch):
    """Transformers 5.17 swallows them among its other keywords, and sees no image at all."""

    def forward(self, input_ids=None, **kwargs): ...

    monkeypatch.setattr(type(case.model), "forward", forward)
    with pytest.raises(SaccadeError, match=rf"{VERSION}.*takes no 'mm_encoder_outputs'"):
        get_family(case.model)


# Skip-Vision


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_found_by_either_name(name):
    cache = DynamicCache()
    assert cache_of({"use_cache": True, name: cache}) is cache
    assert cache_of(BaseModelOutputWithPast(past_key_values=cache)) is cache
    assert cache_of((torch.zeros(1), cache)) is cache
    assert cache_of({name: None}) is None

    def forward(self, input_ids, **others): ...

    forward.__signature__ = signature_of(name)
    assert cache_name(forward) == name


def test_a_forward_with_another_name_for_the_cache_is_refused(case, monkeypatch):
    with pytest.raises(SaccadeError, match=rf"{VERSION}Renamed.forward takes no key-value cache named 'cache' or"):
        cache_name(Renamed().forward)
    language = get_family(case.model).language_model
    monkeypatch.setattr(type(language), "forward", Renamed.forward)
    with pytest.raises(SaccadeError, match=TOLD):
        apply_skip_vision(case.model, options_for("llava"))


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "attention_mask", "position_ids"])
def test_a_language_model_without_an_argument_is_refused(case, monkeypatch, name):
    def forward(self, **kwargs): ...

    names = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache"} - {name}
    forward.__signature__ = signature_of(*sorted(names))
    monkeypatch.setattr(type(get_family(case.model).language_model), "forward", forward)
    with pytest.raises(SaccadeError, match=rf"{VERSION}.*forward takes no '{name}'"):
        apply_skip_vision(case.model, options_for("llava"))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_memory_is_freed_whatever_the_cache_is_called(case, name, monkeypatch):
    """A language model that has one name is handed the cache by it, as releases on both sides of the renaming do."""
    language = get_family(case.model).language_model
    stock = type(language).forward
    own = cache_name(stock)

    def forward(self, *args, **kwargs):
        if name in kwargs:
            kwargs[own] = kwargs.pop(name)
        return stock(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(stock)
    monkeypatch.setattr(type(language), "forward", forward)
    prompts = case.prompts([1])

    def rename(kwargs):
        if own in kwargs:
            kwargs[name] = kwargs.pop(own)

    with skipping(case.model, options_for("llava")) as skip:
        roles = skip.prepare(prompts, padding_side="left")["skip_roles"]
        with calls_changed(language, rename):
            cache = cache_of(case.model.generate(**prompts, **greedy_options(case.model, 3)))
    skipped = int((roles == Role.SKIPPED).sum())
    assert skipped > 0
    assert stored_length(cache) == roles.shape[1] - skipped + 2


def test_a_cache_that_does_not_come_back_is_an_error(case, monkeypatch):
    language = get_family(case.model).language_model
    stock = type(language).forward

    def forward(self, *args, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=stock(self, *args, **kwargs).last_hidden_state)

    forward.__signature__ = inspect.signature(stock)
    monkeypatch.setattr(type(language), "forward", forward)
    with (
        skipping(case.model, options_for("llava")),
        pytest.raises(
            SaccadeError, match=rf"{VERSION}.*should have filled a key-value cache, but its output has none"
        ),
    ):
        case.model.generate(**case.prompts([1]), **greedy_options(case.model, 3))


@pytest.mark.parametrize("layer", [0, -1])
def test_rows_that_a_layer_does_not_hand_on_are_an_error(case, layer):
    layers = get_family(case.model).language_layers
    with (
        skipping(case.model, options_for("llava")),
        calls_changed(layers[layer], lambda kwargs: kwargs.pop("skip_rows")),
        pytest.raises(SaccadeError, match=rf"{VERSION}.*did not pass 'skip_rows' on to"),
    ):
        case.model(**case.prompts([1]))


@pytest.mark.parametrize("part", ["mlp", "self_attn.q_proj"])
def test_a_part_that_a_layer_no_longer_calls_is_an_error(case, part):
    layer = get_family(case.model).language_layers[-1]
    with skipping(case.model, options_for("llava")):
        module = layer.get_submodule(part)
        unpatched = copy.copy(module)
        for name in ("forward", "_saccade_rows", "_saccade_originals"):
            unpatched.__dict__.pop(name)
        parent = layer.get_submodule(part.rpartition(".")[0])
        setattr(parent, part.rpartition(".")[2], unpatched)
        layer.add_module("not_called", module)
        with pytest.raises(SaccadeError, match=rf"{VERSION}.*did not pass.*{type(module).__name__}, or did not call"):
            case.model(**case.prompts([1]))
        del layer.not_called
        setattr(parent, part.rpartition(".")[2], module)


def test_layers_of_another_make_name_the_version(case):
    layer = get_family(case.model).language_layers[0]
    layer.feed_forward = layer.mlp
    del layer.mlp
    message = rf"without 'mlp'.*transformers 5\.\d+ to 5\.\d+ \(here it is {re.escape(transformers.__version__)}\)"
    with pytest.raises(SaccadeError, match=message):
        apply_skip_vision(case.model, options_for("llava"))


def prepared_prompt(case) -> dict:
    with skipping(case.model, options_for("llava")) as skip, torch.no_grad():
        return skip.prepare(case.prompts([1]), padding_side="left")


def test_analysis_misses_no_layer(case):
    prepared = prepared_prompt(case)
    layer = get_family(case.model).language_layers[0]
    called = layer.mlp.forward
    layer.mlp.__class__ = type("Other", (type(layer.mlp),), {"__call__": lambda self, x: called(x)})
    with pytest.raises(SaccadeError, match=rf"{VERSION}of \d decoder layers"):
        analysis.ffn_ratio(case.model, prepared)


def test_analysis_needs_attention_maps(case, monkeypatch):
    prepared = prepared_prompt(case)
    language = get_family(case.model).language_model
    monkeypatch.setattr(language, "set_attn_implementation", lambda kind: None)  # SDPA gives no maps
    with pytest.raises(SaccadeError, match=rf"{VERSION}.*gives no attention map of each layer"):
        analysis.skip_error(case.model, prepared)


# The vision tower


def attention_of(case) -> nn.Module:
    return get_family(case.model).attention_block().attention


@pytest.mark.parametrize(
    ("name", "argument", "told"),
    [
        ("llava", "attention_mask", "called without 'attention_mask'"),
        ("qwen2_5_vl", "cu_seqlens", "called without 'cu_seqlens'"),
        ("qwen3_vl", "position_embeddings", "called without 'position_embeddings'"),
    ],
)
def test_attention_that_is_told_less_is_an_error(name, argument, told):
    """Without what it was told, saliency would be that of other queries and keys, or across images."""
    case = tester.Case(name, FAMILIES[name])
    with hooked_call(attention_of(case), lambda kwargs: kwargs.pop(argument)), pytest.raises(SaccadeError) as caught:
        get_family(case.model).encode(case.inputs, Needs(frozenset({"saliency"})))
    assert told in str(caught.value)
    assert re.match(TOLD, str(caught.value))


def test_attention_that_is_told_something_new_is_an_error(case):
    def rotate(kwargs):
        kwargs["rotary"] = (torch.zeros(1), torch.zeros(1))

    with hooked_call(attention_of(case), rotate), pytest.raises(SaccadeError, match="with 'rotary', which is unknown"):
        get_family(case.model).encode(case.inputs, Needs(frozenset({"keys"})))


@contextmanager
def hooked_call(module: nn.Module, change: Callable[[dict], object]) -> Iterator[None]:
    """Change the keyword arguments before any other hook of the module sees them, as a changed caller would."""

    def before(module, args, kwargs):
        change(kwargs)
        return args, kwargs

    handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("part", ["attention", "query", "key"])
def test_a_tower_that_goes_around_the_block_is_an_error(case, part):
    """Such as one that joins the projections' weights, or calls `forward` itself."""
    module = getattr(get_family(case.model).attention_block(), part)
    module.__class__ = type(
        "Around", (type(module),), {"__call__": lambda self, *args, **kw: self.forward(*args, **kw)}
    )
    with pytest.raises(SaccadeError, match=rf"{VERSION}the vision tower ran without calling"):
        get_family(case.model).encode(case.inputs, Needs(frozenset({"saliency"})))


def test_a_projector_that_goes_around_its_entry_is_an_error(case):
    module = get_family(case.model).projector_entry
    around = {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    module.__class__ = type("Around", (type(module),), around)
    with pytest.raises(SaccadeError, match=rf"{VERSION}the projector did not call its Around"):
        get_family(case.model).encode(case.inputs, Needs(frozenset({"encoder_features"})))


def test_a_clip_tower_of_another_make_is_an_error(case):
    tower = get_family(case.model).vision_tower
    tower.encoder.blocks = tower.encoder.layers
    del tower.encoder.layers
    with pytest.raises(SaccadeError, match=rf"{VERSION}.*\(clip_vision_model\) has no 'encoder.layers'"):
        get_family(case.model).encode(case.inputs)


def test_a_feature_cache_that_could_serve_nothing_is_an_error(case, tmp_path):
    family = frozen_family(case.model)
    cache = FeatureCache(family, tmp_path, 2**30)

    def changed_tower(pixel_values, **kwargs):
        return served(images=pixel_values, **kwargs)

    with cache.serving():
        served = family.vision_tower.forward
        family.vision_tower.forward = changed_tower
        with pytest.raises(SaccadeError, match=rf"{VERSION}.*without 'pixel_values' of four axes"):
            family.encode(case.inputs)


# Training


@pytest.mark.parametrize("layer", [0, -1])
def test_packed_rows_that_a_layer_does_not_hand_on_are_an_error(case, layer):
    """Every token would attend to all rows, before and after it."""
    model = copy.deepcopy(case.model)
    family = get_family(model)
    packing.allow_packing(family)
    step = tester.make_step(family, "divprune", None)
    step.padding_free = True
    with (
        calls_changed(family.language_layers[layer], lambda kwargs: kwargs.pop("packed_rows")),
        pytest.raises(SaccadeError, match=rf"{VERSION}only \d of \d decoder layers passed 'packed_rows' on"),
    ):
        step("slow", case.batch, 1.0)


def test_flash_attention_that_takes_rows_otherwise_is_an_error(case, monkeypatch):
    def forward(query, key, value, cu_seq_lens_q=None, **kwargs): ...

    monkeypatch.setattr(packing, "_flash_attention_forward", forward)
    model = copy.deepcopy(case.model)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(SaccadeError, match=rf"{VERSION}.*takes no 'cu_seq_lens_k' and no 'max_length_q'"):
        packing.allow_packing(get_family(model))


def test_a_wrapper_that_does_not_run_the_forward_is_an_error():
    inner = nn.Linear(2, 2)
    with pytest.raises(SaccadeError, match=r"^accelerate .*Identity did not call the forward of Linear"):
        redirect_forward(nn.Identity(), inner, lambda x: x, torch.zeros(1))
    assert "forward" not in inner.__dict__


def test_the_methods_that_the_trainer_replaces_are_all_checked():
    """An overriding method that the stock trainer no longer has would never be called."""
    ours = {
        name
        for owner in DualSpeedTrainer.__mro__
        if owner.__module__.startswith("saccade.")
        for name, value in vars(owner).items()
        if callable(value) and name != "__init__" and hasattr(SFTTrainer, name)
    }
    assert ours == set(REPLACED)


def test_callbacks_that_are_told_of_no_loader_are_an_error():
    with pytest.raises(SaccadeError, match=rf"{VERSION}callbacks are not given 'train_dataloader'"):
        SigtermCheckpoint(SimpleNamespace()).on_train_begin(None, None, None)


# Benchmarks


def test_timing_a_part_that_is_never_called_is_an_error(case):
    with (
        pytest.raises(SaccadeError, match=rf"{VERSION}.*did not call its tower and its projector and its language"),
        _watched(get_family(case.model), torch.device("cpu")),
    ):
        pass


def test_measuring_attention_without_a_cache_is_an_error(model):
    last = get_family(model).language_layers[-1]

    def drop(kwargs):
        for name in CACHE_NAMES:
            kwargs.pop(name, None)

    config = SkipVisionConfig(retained=4, skipped=8, split="divprune")
    with (
        hooked_call(last.self_attn, drop),
        pytest.raises(SaccadeError, match=rf"{VERSION}.*without a key-value cache"),
    ):
        generation.measure_generation(model, config, PruningConfig(), text_tokens=3, new_tokens=1, repeats=1)


# What this file itself relies on


def test_a_cache_handed_over_by_name_is_used(case):
    output = case.model(**case.prompts([0]), use_cache=True)
    cache = cache_of(output)
    read = stored_length(cache)
    case.model(input_ids=torch.tensor([[5]]), **with_cache(case.model, cache))
    assert stored_length(cache) == read + 1
