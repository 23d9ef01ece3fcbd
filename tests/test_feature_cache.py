"""Features of a frozen tower from disk: those of the tower, never another's, whatever happens to the files."""

import errno
import multiprocessing
import os

import pytest
import torch
from family_models import FAMILIES, WITH_VIDEO, VideoCase
from helpers import TowerRows, feature_files, frozen_family
from transformers import LlavaForConditionalGeneration

from saccade import SaccadeError
from saccade.families import cache as cache_module
from saccade.families import store
from saccade.families.cache import FeatureCache, tower_fingerprint
from saccade.families.store import SLACK, Store, folder_bytes
from saccade.testing.families import Case
from saccade.tiny import build_tiny_llava, build_tiny_processor

GIB = 2**30
SERVED = [name for name in FAMILIES if not name.startswith("qwen")]


def features(family, inputs, cache=None):
    """The features of a batch, through the cache if there is one."""
    if cache is None:
        return family.encode(inputs).context.features.detach()
    with cache.serving():
        return family.encode(inputs).context.features.detach()


@pytest.fixture
def inputs(collator, scenes):
    """A batch of tiny LLaVA with images."""
    batch = dict(collator([row for row in scenes if row["images"]][:6]))
    batch.pop("labels")
    return batch


# What is given


@pytest.mark.interfaces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_features_are_the_towers_bit_for_bit(name, dtype, tmp_path):
    """The rows of a batch go through the tower together, as without a cache, so that not even rounding differs."""
    case = Case(name, FAMILIES[name])
    family = frozen_family(case.model.to(dtype))
    inputs = {key: value.to(dtype) if key == "pixel_values" else value for key, value in case.inputs.items()}
    plain, cache = features(family, inputs), FeatureCache(family, tmp_path, GIB)
    ran = TowerRows(family.vision_tower)
    assert torch.equal(features(family, inputs, cache), plain)
    encoded = ran.rows
    assert encoded == cache.encoded_rows > 0
    again = FeatureCache(family, tmp_path, GIB)
    assert torch.equal(features(family, inputs, again), plain)
    assert ran.rows == encoded
    assert (again.read_rows, again.encoded_rows) == (encoded, 0)
    assert "forward" not in family.vision_tower.__dict__


@pytest.mark.parametrize("name", [name for name in SERVED if name in WITH_VIDEO])
def test_frames_of_videos_are_kept_too(name, tmp_path):
    case = VideoCase(name, FAMILIES[name])
    family = frozen_family(case.model)
    cache = FeatureCache(family, tmp_path, GIB)
    plain = features(family, case.inputs)
    for _ in range(2):
        assert torch.equal(features(family, case.inputs, cache), plain)
    assert cache.read_rows == cache.encoded_rows


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, [1, 2], [-2, 0]])
def test_hidden_states_are_those_that_the_model_reads(feature_layer, tmp_path):
    case = Case("llava", FAMILIES["llava"])
    model, projector = case.model, case.model.model.multi_modal_projector
    model.config.vision_feature_layer = feature_layer
    count = 1 if isinstance(feature_layer, int) else len(feature_layer)
    projector.linear_1 = torch.nn.Linear(32 * count, projector.linear_1.out_features)
    family = frozen_family(model)
    plain, cache = features(family, case.inputs), FeatureCache(family, tmp_path, GIB)
    for _ in range(2):
        assert torch.equal(features(family, case.inputs, cache), plain)


def test_a_reader_of_other_hidden_states_has_a_folder_of_its_own(model, inputs, tmp_path):
    family = frozen_family(model)
    names = set()
    for layer in (-1, -2):
        model.config.vision_feature_layer = layer
        plain, cache = features(family, inputs), FeatureCache(family, tmp_path, GIB)
        assert torch.equal(features(family, inputs, cache), plain)
        names.add(cache.shelf())
    assert len(names) == 2


def test_rows_of_other_batches_are_found_and_equal_rows_encoded_once(model, inputs, tmp_path):
    """A row that ran in another batch differs in rounding at most: matrix products may add up in another order."""
    family, pixels = frozen_family(model), inputs["pixel_values"]
    cache, ran = FeatureCache(family, tmp_path, GIB), TowerRows(model.model.vision_tower)
    plain = features(family, inputs)
    ran.rows = 0
    tower = model.model.vision_tower
    with cache.serving():
        tower(pixels[[0, 1, 1, 0]], output_hidden_states=True)
        assert ran.rows == 2
    torch.testing.assert_close(features(family, inputs, cache), plain, rtol=1e-5, atol=1e-5)
    assert ran.rows == len(pixels)
    assert (cache.read_rows, cache.encoded_rows) == (4, len(pixels))


def test_what_else_the_tower_is_told_counts(tmp_path):
    """Of the same pixels another mask, and of a smaller image interpolated positions, are other features."""
    case = Case("idefics3", FAMILIES["idefics3"])
    tower = frozen_family(case.model).vision_tower
    pixels = case.inputs["pixel_values"].flatten(0, 1)[:2]
    masks = torch.ones(3, 2, 6, 6, dtype=torch.bool)
    masks[1, 1, :, 3:] = False
    masks[2, :, 4:] = False
    cache = FeatureCache(case.family, tmp_path, GIB)
    with torch.no_grad():
        plain = [tower(pixels, patch_attention_mask=mask).last_hidden_state for mask in masks]
        assert not torch.equal(plain[0][1], plain[1][1])
        for _ in range(2):
            with cache.serving():
                served = [tower(pixels, patch_attention_mask=mask).last_hidden_state for mask in masks]
            for given, expected in zip(served, plain, strict=True):
                torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert cache.encoded_rows == 5  # the first row's mask is the same in two of the three calls


def test_options_of_the_tower_count_unless_they_are_off(model, inputs, tmp_path):
    tower, pixels = frozen_family(model).vision_tower, inputs["pixel_values"][:1]
    cache = FeatureCache(frozen_family(model), tmp_path, GIB)
    for options, encoded in (
        ({}, 1),
        ({"interpolate_pos_encoding": False, "output_hidden_states": True}, 1),
        ({"interpolate_pos_encoding": True}, 2),
    ):
        with cache.serving():
            tower(pixels, **{"output_hidden_states": [-2], **options})
        assert cache.encoded_rows == encoded


def test_a_call_for_what_is_not_kept_goes_to_the_tower(model, inputs, tmp_path):
    model.set_attn_implementation("eager")
    tower, pixels = frozen_family(model).vision_tower, inputs["pixel_values"]
    cache = FeatureCache(frozen_family(model), tmp_path, GIB)
    with cache.serving():
        for _ in range(2):
            assert tower(pixels, output_attentions=True).attentions[0].shape[0] == len(pixels)
            assert isinstance(tower(pixels, output_hidden_states=True, return_dict=False), tuple)
            assert tower(pixels).last_hidden_state.shape[0] == len(pixels)
        for wrong, error in (((), SaccadeError), ((pixels[:0],), RuntimeError)):
            with pytest.raises(error):
                tower(*wrong, output_hidden_states=True)
    assert not feature_files(tmp_path)


def test_autocast_makes_other_features(model, inputs, tmp_path):
    family = frozen_family(model)
    cache = FeatureCache(family, tmp_path, GIB)
    full = features(family, inputs, cache)
    with torch.autocast("cpu", torch.bfloat16):
        plain = features(family, inputs)
        assert torch.equal(features(family, inputs, cache), plain)
        assert torch.equal(features(family, inputs, cache), plain)
    assert not torch.equal(plain.float(), full)
    assert torch.equal(features(family, inputs, cache), full)


def test_the_projector_gets_its_gradient_and_the_tower_none(model, inputs, tmp_path):
    family = frozen_family(model)
    cache = FeatureCache(family, tmp_path, GIB)
    gradients = []
    for serving in (None, cache, cache):
        model.zero_grad()
        if serving is None:
            family.encode(inputs).context.features.square().sum().backward()
        else:
            with serving.serving():
                family.encode(inputs).context.features.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in family.projector.parameters()])
        assert all(parameter.grad is None for parameter in family.vision_tower.parameters())
    for other in gradients[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients[0], other, strict=True))


# Whose it is


def test_another_towers_features_are_never_read(model, inputs, tmp_path):
    family = frozen_family(model)
    cache = FeatureCache(family, tmp_path, GIB)
    before = features(family, inputs, cache)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    for served in (cache, FeatureCache(family, tmp_path, GIB)):  # in the same run, and in the next
        assert torch.equal(features(family, inputs, served), features(family, inputs))
    assert not torch.equal(features(family, inputs), before)
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_are_hashed_once(model, inputs, tmp_path, monkeypatch):
    """Not after every step in which DDP wrote the same values to the buffers of a rank."""
    family, found = frozen_family(model), []
    monkeypatch.setattr(
        cache_module, "tower_fingerprint", lambda *given: found.append(tower_fingerprint(*given)) or "x"
    )
    cache = FeatureCache(family, tmp_path, GIB)
    for _ in range(3):
        features(family, inputs, cache)
        for buffer in family.vision_tower.buffers():
            buffer.copy_(buffer.clone())
    assert len(found) == 1


def test_the_fingerprint_is_of_the_tower_and_of_nothing_else(model, processor, tmp_path):
    tower, states = model.model.vision_tower, frozen_family(model).vision_feature_layers
    name = tower_fingerprint(tower, states)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert tower_fingerprint(loaded.model.vision_tower, states) == name
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight += 1
    assert tower_fingerprint(tower, states) == name
    others = {
        tower_fingerprint(build_tiny_llava(processor, seed=1).model.vision_tower, states),
        tower_fingerprint(loaded.to(torch.bfloat16).model.vision_tower, states),
        tower_fingerprint(tower, (0,)),
    }
    tower.config.hidden_act = "relu"
    others.add(tower_fingerprint(tower, states))
    assert len(others | {name}) == 5


# What happens to files


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "one bit", "folder"])
def test_damaged_files_count_as_missing(model, inputs, tmp_path, damage):
    family = frozen_family(model)
    plain = features(family, inputs, FeatureCache(family, tmp_path, GIB))
    for path in feature_files(tmp_path):
        content = bytearray(path.read_bytes())
        if damage == "folder":
            path.unlink()
            path.mkdir()
            continue
        if damage == "one bit":
            content[-5] ^= 1
        path.write_bytes(
            {"cut": content[:-7], "empty": b"", "garbage": os.urandom(len(content)), "one bit": content}[damage]
        )
    cache = FeatureCache(family, tmp_path, GIB)
    assert torch.equal(features(family, inputs, cache), plain)
    assert cache.read_rows == 0
    if damage != "folder":
        assert torch.equal(features(family, inputs, FeatureCache(family, tmp_path, GIB)), plain)
        again = FeatureCache(family, tmp_path, GIB)
        features(family, inputs, again)
        assert again.encoded_rows == 0


def test_features_that_are_no_numbers_are_not_kept(model, inputs, tmp_path):
    family = frozen_family(model)
    cache = FeatureCache(family, tmp_path, GIB)
    pixels = inputs["pixel_values"].clone()
    pixels[1, 0, 0, 0] = torch.nan
    given = features(family, {**inputs, "pixel_values": pixels}, cache)
    assert given[1].isnan().any()
    assert len(feature_files(tmp_path)) == len(pixels) - 1


def test_the_bound_holds_for_all_that_is_in_the_folder(model, inputs, tmp_path, caplog):
    family, rows = frozen_family(model), len(inputs["pixel_values"])
    plain = features(family, inputs, FeatureCache(family, tmp_path / "free", GIB))
    entry = feature_files(tmp_path / "free")[0].stat().st_size
    folder = tmp_path / "bounded"
    folder.mkdir()
    (folder / "of another run").write_bytes(bytes(10 * entry))
    bound = 13 * entry  # with the file that says whose features they are, room for two
    cache = FeatureCache(family, folder, bound)
    for _ in range(3):
        assert torch.equal(features(family, inputs, cache), plain)
    assert len(feature_files(folder)) == 2
    assert folder_bytes(folder) <= bound + bound // SLACK + entry
    assert [record.message for record in caplog.records if "is full" in record.message] == [
        f"feature_cache={str(folder)!r} is full (feature_cache_gib={bound / GIB:g}): no more features are stored in "
        "this run, those that are there are still read"
    ]
    assert cache.encoded_rows == rows + 2 * (rows - 2)


def test_what_is_promised_and_not_yet_written_counts(tmp_path):
    """Threads that write side by side look at the folder before the others' files lie in it."""
    store = Store(tmp_path, 1000)
    assert sum(store._has_room(100) for _ in range(20)) == 10


def test_several_writers_stay_within_the_bound_and_its_slack(tmp_path):
    """They write in turns, each unaware of the others between two looks at the folder."""
    bound, tensors = 2**20, {"x": torch.zeros(512)}
    writers = [Store(tmp_path, bound) for _ in range(4)]
    number = 0
    while not all(writer.stopped for writer in writers):
        for writer in writers:
            writer.write("shelf", f"{number:032x}", tensors)
            number += 1
    entry = feature_files(tmp_path)[0].stat().st_size
    assert bound * 0.9 < folder_bytes(tmp_path) <= bound + len(writers) * (bound // SLACK + entry)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_costs_one_warning(model, inputs, tmp_path, monkeypatch, caplog, code):
    family = frozen_family(model)
    tried = []

    def refuse(path, flush):
        tried.append(path)
        raise OSError(code, os.strerror(code), str(path))

    plain = features(family, inputs, FeatureCache(family, tmp_path, GIB))
    half = feature_files(tmp_path)[::2]
    for path in half:
        path.unlink()
    monkeypatch.setattr(store, "atomic_path", refuse)
    cache = FeatureCache(family, tmp_path, GIB)
    for _ in range(2):
        torch.testing.assert_close(features(family, inputs, cache), plain, rtol=1e-5, atol=1e-5)
    assert [record.levelname for record in caplog.records if os.strerror(code) in record.message] == ["WARNING"]
    assert 0 < len(tried) <= len(half)
    assert cache.encoded_rows == 2 * len(half)  # what is there is still read


def _fill(folder: str, start, reverse: bool):
    """Fill a folder row by row: the features of each row, and how many were read and encoded."""
    torch.set_num_threads(1)
    model = build_tiny_llava(build_tiny_processor(), seed=0)
    cache = FeatureCache(frozen_family(model), folder, GIB)
    pixels = torch.randn(24, 3, *[model.config.vision_config.image_size] * 2, generator=torch.manual_seed(0))
    start.wait()
    found = {}
    for row in list(range(24))[:: -1 if reverse else 1]:
        with cache.serving():
            states = model.model.vision_tower(pixels[row : row + 1], output_hidden_states=True).hidden_states
        found[row] = states[model.config.vision_feature_layer].tolist()
    return found, cache.read_rows, cache.encoded_rows


def _answer(answers, *given) -> None:
    answers.put(_fill(*given))


@pytest.mark.slow
def test_two_processes_fill_a_folder_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    folder = str(tmp_path)
    processes = [
        context.Process(target=_answer, args=(answers, folder, start, reverse), daemon=True)
        for reverse in (False, True)
    ]
    for process in processes:
        process.start()
    (first, *counts), (second, *other_counts) = (answers.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert first == second
    assert sum(counts) == sum(other_counts) == 24
    assert len(feature_files(folder)) == 24
    assert not list(tmp_path.rglob(".*"))
    assert _fill(folder, context.Barrier(1), False) == (first, 24, 0)
