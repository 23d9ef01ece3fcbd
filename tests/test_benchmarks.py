"""Timings and counts: what they count, how they mix and sum up, and that each runs as a user runs it."""

import csv
import json
import statistics
import weakref

import pytest
import torch
from family_models import FAMILIES
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import flop_registry

from benchmarks import flops, generate, images, lora_casts, short_rows, steps, train, write_performance
from benchmarks.batches import image_inputs, label_count, make_batch
from benchmarks.counting import count_saved_bytes
from benchmarks.flops import cache_bytes, prefill_flops
from benchmarks.generation import generation_model, measure_generation
from benchmarks.ledger import append_rows, figures
from benchmarks.released import ReleasedProcedure, divprune_image, rows_of_labels, shifted_cross_entropy
from benchmarks.shapes import build_shape, shape_config
from benchmarks.steps import Stage, Timing, train_stage, whole_schedule
from benchmarks.variants import (
    ALL_PACKED,
    IN_PARTS,
    LOWER,
    NO_PADDING,
    PRUNED_PACKED,
    STOCK,
    Settings,
    training_variants,
)
from saccade.cli.main import guarded
from saccade.errors import SaccadeError
from saccade.evaluation.counting import VARIABLE_LENGTH, count_flops
from saccade.families import get_family
from saccade.reducers import PruningConfig, get_reducer
from saccade.skip_vision import SkipVisionConfig
from saccade.testing.families import Case
from saccade.tokens import VisualContext
from saccade.training.flops import TextShape, VisualRows
from saccade.training.length_table import LLAVA_665K, draw_lengths


def test_short_rows_are_timed_beside_sdpa(capsys):
    assert short_rows.main(["--lengths", "5", "9", "--repeats", "2"]) == 0
    cells = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [int(row[0]) for row in cells] == [5, 9]
    for _, products, sdpa, ratio in cells:
        assert float(sdpa.split()[0]) / float(products.split()[0]) == pytest.approx(
            float(ratio.strip(" x")), rel=0.05, abs=0.06
        )


def test_rows_of_images_and_a_clip(tmp_path, capsys):
    file = tmp_path / "images.json"
    assert guarded(lambda: images.main(["--quick", "--repeats", "1", "--output", str(file)])) == 0
    found = json.loads(file.read_text())
    for row in found["measured"].values():
        assert (row["all"]["tokens"], row["kept"]["tokens"]) == (64 + 2 + 32, 6 + 2 + 32)
        assert row["all"]["saved_bytes"] > 2 * row["kept"]["saved_bytes"]
    planned = [row["kept"]["tokens"] for row in found["planned"].values()]
    assert planned == [58 + 4 + 128, 58 + 128]
    assert "a clip of 2 frames" in capsys.readouterr().out
    with pytest.raises(SaccadeError, match="repeats=0"):
        images.main(["--repeats", "0"])


@pytest.fixture
def small_batch(model):
    return make_batch(get_family(model), draw_lengths(LLAVA_665K, 3, seed=1), seed=2)


def test_lengths_are_the_same_for_the_same_seed_and_about_as_the_table_says():
    assert draw_lengths(LLAVA_665K, 50, seed=3) == draw_lengths(LLAVA_665K, 50, seed=3)
    drawn = statistics.fmean(text.tokens for text in draw_lengths(LLAVA_665K, 4000, seed=0))
    weights = [source.samples for source in LLAVA_665K]
    typical = [source.turns * (source.question + source.answer) for source in LLAVA_665K]
    expected = sum(w * t for w, t in zip(weights, typical, strict=True)) / sum(weights)
    # The mean of a log-normal is above its median.
    assert expected < drawn < 1.15 * expected


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava-next-7b", "qwen2.5-vl-7b")]


@pytest.mark.parametrize("shape", ["tiny", "llava-1.5-7b", *LARGE])
def test_batches_fit_their_models(shape):
    """As many placeholders as the model's own tower gives features, checked on a shape cut to a sliver."""
    cuts = {} if shape == "tiny" else {"layers": 1, "width": 512, "tower_layers": 2}
    if shape == "qwen2.5-vl-7b":
        cuts["width"] = 896
    model = build_shape(shape, **cuts)
    family = get_family(model)
    batch = make_batch(family, draw_lengths(LLAVA_665K, 1, seed=0), seed=0)
    _, visual = image_inputs(family, 1, torch.Generator())
    assert int(family.placeholder(batch["input_ids"]).sum()) == visual
    assert 0 < label_count(batch) < int(batch["attention_mask"].sum()) - visual
    with torch.no_grad():
        family.encode(batch)
        if shape == "tiny":
            assert torch.isfinite(model(**batch).loss)


def test_flops_of_the_cpus_attention_kernel_are_counted():
    query = torch.randn(1, 2, 5, 4)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == 2 * 2 * (
        2 * 5 * 5 * 4
    )


def test_flops_of_rows_without_padding_are_counted_by_a_torch_without_their_formulas(monkeypatch):
    """Torch 2.11 has none: every variant without padding would seem to need no attention."""
    for operation in VARIABLE_LENGTH:
        monkeypatch.delitem(flop_registry, operation, raising=False)
    query, ends = torch.randn(8, 2, 4, device="meta", requires_grad=True), torch.tensor([0, 3, 8])

    def attend():
        torch.nn.attention.varlen.varlen_attn(
            query, query, query, ends, ends, 5, 5, window_size=(-1, 0)
        ).sum().backward()

    forward = 2 * 2 * 2 * (3 * 3 + 5 * 5) * 4
    # The backward pass computes the scores anew, and four gradients.
    assert count_flops(attend) == forward + forward // 2 * 5


def test_saved_bytes_leave_out_parameters_and_count_memory_once():
    layer = torch.nn.Linear(8, 8, bias=False)
    given = torch.randn(3, 8, requires_grad=True)
    with count_saved_bytes(layer.parameters()) as saved:
        hidden = layer(given)
        loss = (hidden.exp() + hidden.exp()).sum()
    # `given`, and the two results of exp.
    assert saved.now == saved.peak == 3 * (3 * 8 * 4)
    del hidden, loss
    assert saved.now == 0


def test_the_released_selection_is_divprune(small_batch, model):
    """Image by image, and with the number of tokens rounded down as there."""
    features = get_family(model).encode(small_batch).context.features.detach()
    keep = int((1 - 0.9) * features.shape[1])
    expected = get_reducer("divprune")(VisualContext(features), keep).index
    found = torch.stack([divprune_image(image, keep) for image in features])
    assert torch.equal(found, expected)


def test_the_released_slow_step_is_its_formula(small_batch, model):
    released = ReleasedProcedure(model, isolator_length=4)
    with torch.no_grad():
        got = released.slow(small_batch)
        full = model(**{name: value for name, value in small_batch.items() if name != "labels"}).logits
        teacher, teacher_labels = released._pass(small_batch, prune=True)
    labels = small_batch["labels"]
    wanted = labels[:, 1:] != -100
    student = full[:, :-1][wanted]
    taught = teacher[:, :-1][teacher_labels[:, 1:] != -100]
    kl = (taught.softmax(1) * (taught.log_softmax(1) - student.log_softmax(1))).sum() / len(student)
    expected = torch.nn.functional.cross_entropy(student, labels[:, 1:][wanted]) + kl
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(rows_of_labels(full, labels), student)
    torch.testing.assert_close(shifted_cross_entropy(full, labels), model(**small_batch).loss)


def test_the_released_procedure_is_given_the_valid_rows_of_llava_next():
    """Its crops have unequal numbers of rows, and are padded; padding would be tokens, and candidates to be kept."""
    model = build_shape("llava-next-7b", 1, 128, tower_layers=2)
    family = get_family(model)
    batch = make_batch(family, draw_lengths(LLAVA_665K, 2, seed=0), seed=0)
    released, lengths = ReleasedProcedure(model, isolator_length=3), []
    handle = family.language_model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["attention_mask"].sum(dim=1)), with_kwargs=True
    )
    with torch.no_grad():
        valid = family._encode(batch).context.valid.sum(dim=1)
        released._pass(batch, prune=False)
        released._pass(batch, prune=True)
    handle.remove()
    assert valid.unique().numel() > 1
    full, pruned = lengths
    assert torch.equal(full, batch["attention_mask"].sum(dim=1))
    kept = ((1 - 0.9) * valid.double()).int() + 3
    text = full - family.placeholder(batch["input_ids"]).sum(dim=1)
    assert torch.equal(pruned, text + kept.view(2, -1).sum(dim=1))


def test_variants_leave_nothing_on_the_model(small_batch, model):
    """Neither hidden states, which would count in the peaks of others, nor wrappers, one more in each step."""
    variants = {variant.name: variant for variant in training_variants(model, Settings(), slow=True)[0]}
    before = model.__dict__.get("forward")
    for name in (STOCK, "released procedure, slow step"):
        alive = []
        handle = get_family(model).language_model.register_forward_hook(
            lambda module, args, output: alive.extend(map(weakref.ref, output.hidden_states or ()))  # noqa: B023
        )
        with variants[name].active() as loss:
            value = loss(small_batch)
            assert any(state() is not None for state in alive) == (name != STOCK)
            value.backward()
        handle.remove()
        del value
        assert not [state for state in alive if state() is not None]
        assert model.__dict__.get("forward") is before


@pytest.mark.interfaces
def test_every_variant_gives_the_parameters_of_its_stage_a_gradient(small_batch, model):
    """And leaves the model as it found it: the stock loss is the same before and after all of them."""
    family = get_family(model)
    stage = Stage("sft", LLAVA_665K, 665, 3, language=True)
    train_stage(model, family, stage)
    variants, mixes = training_variants(model, Settings(), slow=True)
    names = [variant.name for variant in variants]
    assert names[0] == STOCK
    assert all(part in names for mix in mixes for part in mix.parts)
    losses = {}
    for variant in (*variants, variants[0]):
        model.zero_grad(set_to_none=True)
        with variant.active() as loss:
            value = loss(small_batch)
            value.backward()
        assert torch.isfinite(value)
        assert all(p.grad is not None for p in (*family.projector.parameters(), *family.language_layers.parameters()))
        assert all(p.grad is None for p in family.vision_tower.parameters())
        losses.setdefault(variant.name, []).append(value.detach())
    assert torch.equal(*losses[STOCK])
    # Each way to train is a loss of its own; those that only compute it otherwise have the same.
    for mode, names in {"fast": (NO_PADDING,), "slow": (NO_PADDING, IN_PARTS)}.items():
        for name in names:
            same = losses.pop(f"{name}, {mode} step")
            torch.testing.assert_close(same, losses[f"DualSpeed, {mode} step"])
    for packed, padded in {ALL_PACKED: STOCK, PRUNED_PACKED: "pruning only"}.items():
        torch.testing.assert_close(losses.pop(packed)[0], losses[padded][0])
    assert len({float(values[0]) for values in losses.values()}) == len(losses)


def test_a_lower_resolution_has_about_as_many_patches_as_pruning_keeps(small_batch, model):
    """16 of 144 where 14 are kept, and the text as before."""
    family = get_family(model)
    seen = []
    hook = family.language_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with hook:
        for variant in training_variants(model, Settings(), slow=False)[0]:
            if variant.name in (STOCK, LOWER):
                with variant.active() as loss:
                    loss(small_batch)
    whole, lower = seen
    assert whole == small_batch["input_ids"].shape[1]
    assert whole - lower == 144 - 16


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_a_stage_trains_the_projector_and_stage_two_the_language_model(name, adapters):
    """Of Qwen-VL, whose projector lies inside its vision module, too."""
    model = Case(name, FAMILIES[name]).model
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    family = get_family(model)
    projector = {id(parameter) for parameter in family.projector.parameters()}
    language = {id(parameter) for parameter in family.language_model.parameters()}
    for stage in ("pretrain", "sft"):
        train_stage(model, family, Stage(stage, (), 1, 1, language=stage == "sft"))
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        adapted = {id(weight) for weight_name, weight in model.named_parameters() if "lora_" in weight_name}
        expected = projector | ((adapted if adapters else language) if stage == "sft" else set())
        assert trained - {id(weight) for weight in family.model.get_output_embeddings().parameters()} == expected


def test_the_parts_of_a_step_do_not_overlap(monkeypatch):
    """Qwen-VL's projector runs inside its vision module, and its time is not the tower's."""
    case = Case("qwen2_5_vl", FAMILIES["qwen2_5_vl"])
    family, now = case.family, [0]

    def takes(seconds):
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(steps, "own_seconds_on", lambda device: now[0])
    handles = [
        next(family.projector_entry.children()).register_forward_hook(takes(100)),
        family.model.base_model.visual.blocks[0].register_forward_hook(takes(10)),
        family.language_layers[0].register_forward_hook(takes(1)),
    ]
    with steps._watched(family, torch.device("cpu")) as spent, torch.no_grad():
        family.model(**case.inputs)
    for handle in handles:
        handle.remove()
    assert (spent["projector"], spent["tower"], spent["language"]) == (100, 10, 1)


@pytest.mark.slow
@pytest.mark.parametrize("language", [False, True], ids=["stage one", "stage two"])
def test_every_variant_of_qwen_vl_is_timed(language):
    model = Case("qwen2_5_vl", FAMILIES["qwen2_5_vl"]).model
    stage = Stage("sft" if language else "pretrain", LLAVA_665K, 1, 1, language)
    found = steps.measure_stage(model, stage, Settings(), repeats=1, warm_up=0)
    assert {STOCK, "DualSpeed, fast step", "Skip-Vision"} <= {timing.variant for timing in found}
    for timing in found:
        assert timing.flops > 0 < timing.seconds[0]
        assert not timing.parts or min(timing.parts[name] for name in ("tower", "projector", "language")) > 0


def test_the_whole_schedule_weighs_stages_by_their_samples():
    stages = [Stage("pretrain", (), 3, 2, False), Stage("sft", (), 5, 2, True)]
    timings = {
        "pretrain": {STOCK: Timing("pretrain", STOCK, [2.0]), "pruning only": Timing("pretrain", "", [1.0])},
        "sft": {STOCK: Timing("sft", STOCK, [4.0]), "pruning only": Timing("sft", "", [2.0])},
    }
    expected = (3 / 2 * 2 + 5 / 2 * 4) / (3 / 2 * 1 + 5 / 2 * 2)
    assert whole_schedule(stages, timings) == {"pruning only": pytest.approx(expected)}


def test_the_command_measures_both_stages_and_writes_ledger_json_and_pictures(tmp_path, capsys):
    ledger = tmp_path / "ledger.csv"
    flags = ["--repeats", "2", "--warm-up", "0", "--batch-size", "2", "--output", str(tmp_path / "out")]
    assert train.main([*flags, "--ledger", str(ledger)]) == 0
    result = json.loads((tmp_path / "out" / "bench_train.json").read_text())
    sft = {entry["variant"]: entry for entry in result["timings"]["sft"]}
    mixed, fast, slow = (sft[f"DualSpeed{kind}"] for kind in ("", ", fast step", ", slow step"))
    assert mixed["flops"] == pytest.approx(0.9 * fast["flops"] + 0.1 * slow["flops"])
    for number in range(2):
        expected = 0.9 * fast["seconds"][number] + 0.1 * slow["seconds"][number]
        assert mixed["seconds"][number] == pytest.approx(expected)
    assert sft[STOCK]["ratios"] == [1.0, 1.0]
    assert fast["flops"] < sft["Skip-Vision"]["flops"] < sft[STOCK]["flops"] < slow["flops"]
    assert fast["saved_bytes"] < sft[STOCK]["saved_bytes"]
    # The stock step reads its metrics each time, and the released one each sample's places; the number of rows and of
    # labels is all that ours must know.
    assert fast["syncs"] < sft[STOCK]["syncs"] < sft["released procedure, slow step"]["syncs"]
    assert slow["syncs"] < 2 * fast["syncs"]
    assert sft["DualSpeed, slow in parts, slow step"]["saved_bytes"] < 0.7 * slow["saved_bytes"]
    for entry in result["timings"]["sft"]:
        assert not entry["parts"] or sum(entry["parts"].values()) == pytest.approx(1)
    assert fast["parts"]["selection"] > 0
    assert result["whole_schedule"].keys() >= {"DualSpeed", "released procedure", "Skip-Vision"}
    rows = list(csv.DictReader(ledger.open()))
    step = next(row for row in rows if (row["provider"], row["metric"]) == ("DualSpeed", "step"))
    assert float(step["p50"]) == pytest.approx(1000 * statistics.median(mixed["seconds"]), rel=1e-3)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "bench_train_parts.png",
        "bench_train_speedups.png",
    }
    assert "both stages" in capsys.readouterr().out


QUICK = ["--repeats", "2", "--warm-up", "1", "--batch-size", "2"]


@pytest.fixture
def done(monkeypatch):
    """What would be measured, in order: (work, variant). Nothing is computed."""
    done = []

    def count(variant, batch, timing, model, optimizer):
        done.append(("count", variant.name))
        timing.flops, timing.saved_bytes = 1.0, 1

    def step(variant, batch, optimizer):
        done.append(("step", variant.name))
        return 1.0, None

    def parts(variant, family, batches, optimizer):
        done.append(("parts", variant.name))
        return {"backward": 1.0}

    for name, stand_in in (("_count", count), ("_step", step), ("_parts", parts)):
        monkeypatch.setattr(steps, name, stand_in)
    return done


@pytest.mark.parametrize("last", [5, 25, 35, 60, 100])
def test_an_interrupted_benchmark_goes_on_with_what_is_missing(last, done, tmp_path, monkeypatch):
    flags = [*QUICK, "--output", str(tmp_path)]
    assert train.main(flags) == 0
    whole, result = list(done), json.loads((tmp_path / train.RESULT_FILE).read_text())
    assert not (tmp_path / train.UNFINISHED_FILE).exists()
    (tmp_path / train.RESULT_FILE).unlink()
    done.clear()
    step = steps._step

    def interrupted(*args):
        if len(done) >= last:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(steps, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(steps, "_step", step)
    before = list(done)
    assert train.main(flags) == 0
    for work in ("count", "parts"):
        assert [entry for entry in done if entry[0] == work] == [entry for entry in whole if entry[0] == work]
    # At most one repeat and the warm-up are done once more.
    assert len(whole) <= len(done) <= len(whole) + 2 * 20
    assert len(done) - len(before) < len(whole)
    assert json.loads((tmp_path / train.RESULT_FILE).read_text())["timings"] == result["timings"]
    # Another benchmark takes none of it.
    (tmp_path / train.UNFINISHED_FILE).write_text(json.dumps({"origin": {}, "timings": {}}))
    done.clear()
    assert train.main(flags) == 0
    assert done == whole


@pytest.mark.parametrize("short", ["released procedure, slow step", STOCK])
@pytest.mark.parametrize("work", ["_count", "_step", "_parts"])
def test_a_variant_without_enough_memory_is_recorded_and_ends_nothing(
    work, short, done, tmp_path, monkeypatch, capsys
):
    original, calls = getattr(steps, work), []

    def fails(variant, *args):
        if variant.name == short:
            calls.append(variant)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(variant, *args)

    monkeypatch.setattr(steps, work, fails)
    assert train.main([*QUICK, "--output", str(tmp_path), "--ledger", str(tmp_path / "ledger.csv")]) == 0
    assert len(calls) == (2 if short == STOCK else 1)  # once a stage
    result = json.loads((tmp_path / train.RESULT_FILE).read_text())
    entries = {entry["variant"]: entry for entry in result["timings"]["sft"]}
    missing = {name for name, entry in entries.items() if entry["out_of_memory"]}
    assert missing == ({STOCK} if short == STOCK else {short, "released procedure"})
    for name, entry in entries.items():
        assert len(entry["seconds"]) == (0 if name in missing else 2)
        assert len(entry["ratios"]) == (0 if name in missing or short == STOCK else 2)
    methods = result["whole_schedule"]
    assert "released procedure" not in methods
    assert ("DualSpeed" in methods) == (short != STOCK)
    shown = capsys.readouterr().out
    assert "out of memory" in next(line for line in shown.splitlines()[::-1] if short in line)
    rows = list(csv.DictReader((tmp_path / "ledger.csv").open()))
    assert not [row for row in rows if row["provider"] == short and "sft" in row["shape"]]
    assert [row for row in rows if row["provider"] == "DualSpeed" and "sft" in row["shape"]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_names_the_gpu_of_steps_on_one(device, done, tmp_path, monkeypatch):
    assert train.main([*QUICK, "--output", str(tmp_path)]) == 0
    file = tmp_path / train.RESULT_FILE
    result = json.loads(file.read_text())
    result["bench"]["device"] = device
    result["environment"]["gpus"] = [{"name": "NVIDIA H200", "memory_gib": 139}]
    file.write_text(json.dumps(result))
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.setattr(write_performance, "DOCS", tmp_path / "docs")
    assert ("NVIDIA H200" in write_performance.section("tiny", tmp_path)) == (device == "cuda")


def test_saved_bytes_of_a_step_leave_out_frozen_weights():
    """They are in memory whatever trains; with adapters, nearly all weights are frozen."""
    bench = train.TrainBench(lora=True, batch_size=1)
    model = train.build_model(bench)
    train_stage(model, get_family(model), bench.stages[1])
    batch = make_batch(get_family(model), draw_lengths(bench.stages[1].sources, 1, 0), 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (variant, *_), _ = training_variants(model, bench.settings, slow=False)
    timing = Timing("sft", variant.name)
    steps._count(variant, batch, timing, model, torch.optim.AdamW(trained))
    with variant.active() as loss, count_saved_bytes(trained) as more:
        loss(batch)
    frozen = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in model.parameters()}
    kept = []
    with variant.active() as loss, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        loss(batch)
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert timing.saved_bytes == sum(size for address, size in memory.items() if address not in frozen)
    assert timing.saved_bytes < more.peak


def test_figures_are_percentiles_and_a_ratio():
    found = figures([3.0, 1.0, 2.0], [4.0])
    assert found["p50"] == "2"
    assert found["ratio_to_baseline"] == "0.5"
    assert float(found["p20"]) < 2 < float(found["p80"])


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SaccadeError, match="is not a ledger"):
        append_rows(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_flops_of_a_budget(tmp_path, capsys):
    output = tmp_path / "flops.json"
    flags = ["--shape", "llama3-8b", "--budget", "full,58,100/156,10+20", "--output", str(output)]
    assert flops.main(flags) == 0
    [found] = json.loads(output.read_text())["shapes"]
    text = TextShape.of(shape_config("llama3-8b"))
    expected = {"full": (576, 0, 0), "58": (58, 0, 0), "100/156": (100, 2, 156), "10+20": (10, 2, 20)}
    for name, rows in expected.items():
        rows = VisualRows(*rows)
        assert found["budgets"][name]["prefill"] == prefill_flops(text, rows, 60)
        assert found["budgets"][name]["cache_bytes"] == cache_bytes(text, rows.kept + 60)
    assert "100 + 2 + 156" in capsys.readouterr().out


def test_flops_measured(tmp_path):
    output = tmp_path / "flops.json"
    flags = ["--shape", "tiny", "--budget", "full,100/156", "--measure", "--repeats", "2", "--output", str(output)]
    assert flops.main(flags) == 0
    report = json.loads(output.read_text())
    [measured] = report["measured"]
    counts = report["shapes"][0]["budgets"]
    # The measured model is in float32, the count in two bytes a value.
    assert measured["full"]["cache"] == 2 * counts["full"]["cache_bytes"]
    assert measured["skip"]["cache"] == 2 * counts["100/156"]["cache_bytes"]
    assert measured["skip"]["cache_peak"] == 2 * counts["100/156"]["cache_bytes_prompt"]
    assert all(len(measured[kind][name]) == 2 for kind in ("full", "skip") for name in ("prefill", "decode"))


@pytest.mark.slow
def test_generation_of_several_images_of_a_cut_shape():
    model = generation_model("llama3-8b", layers=1, width=512)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_generation(
        model, SkipVisionConfig(), PruningConfig(), images=2, text_tokens=5, new_tokens=2, repeats=1
    )
    assert found["full"].prompt_rows == {"text": 5, "visual": 1152}
    assert found["prune"].prompt_rows == {"text": 5, "kept": 116}
    assert found["prune"].cache == found["prune"].cache_peak == cache_bytes(text := TextShape.of(model.config), 121, 4)
    assert found["skip"].prompt_rows == {"text": 5, "retained": 200, "summary": 4, "skipped": 312}
    assert (found["full"].cache, found["full"].cache_peak) == (cache_bytes(text, 1157, 4),) * 2
    assert found["skip"].cache == cache_bytes(text, 209, 4)
    assert found["skip"].cache_peak == cache_bytes(text, 521, 4)
    assert before.keys() == model.state_dict().keys()


def test_the_benchmark_appends_to_its_ledger(tmp_path):
    ledger = tmp_path / "ledger.csv"
    flags = ["--images", "1,2", "--repeats", "2", "--new-tokens", "2"]
    assert generate.main(["--ledger", str(ledger), *flags]) == 0
    rows = list(csv.DictReader(ledger.open()))
    metrics = ["prefill", "decode", "layout", "cache_peak", "cache"]
    kinds = [("full", name) for name in metrics if name != "layout"]
    kinds += [(provider, name) for provider in ("prune 0.9", "skip 100/156") for name in metrics]
    assert [(row["provider"], row["metric"]) for row in rows] == 2 * kinds
    by_metric = {(row["provider"], row["metric"]): row for row in rows[: len(kinds)]}
    assert by_metric["full", "prefill"]["ratio_to_baseline"] == "1"
    text = TextShape.of(shape_config("tiny"))
    assert int(by_metric["skip 100/156", "cache"]["p50"]) == cache_bytes(text, 27 + 60, 4)
    assert float(by_metric["skip 100/156", "cache"]["ratio_to_baseline"]) == pytest.approx(87 / 204, rel=1e-3)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (train, ["--shape", "gpt"], "shape='gpt'"),
        (train, ["--shape", "llama3-8b"], "has no vision tower"),
        (train, ["--repeats", "0"], "repeats=0"),
        (train, ["--dtype", "int8"], "dtype='int8'"),
        (train, ["--device", "cuda:9"], "device='cuda:9'"),
        (train, ["--reducer", "best"], "best"),
        (train, ["--skip", "1/2"], "preset='1/2'"),
        (train, ["--prune-ratio", "1.5"], "prune_ratio=1.5"),
        (train, ["--slow-probability", "2"], "slow_probability=2.0"),
        (train, ["--layers", "99", "--shape", "llava-1.5-7b"], "layers=99"),
        (train, ["--tower-layers", "99", "--shape", "llava-1.5-7b"], "tower_layers=99"),
        (generate, ["--images", "some"], "images='some'"),
        (generate, ["--images", "0"], "images=(0,)"),
        (generate, ["--shape", "qwen2.5-vl-7b"], "cannot be timed"),
        (generate, ["--preset", "7/7"], "preset='7/7'"),
        (generate, ["--prune-ratio", "2"], "prune_ratio=2.0"),
        (flops, ["--shape", "gpt"], "shape='gpt'"),
        (flops, ["--shape", "tiny", "--budget", "1000"], "budget='1000'"),
        (flops, ["--shape", "tiny", "--budget", "10/20"], "budget='10/20'"),
        (flops, ["--shape", "tiny", "--budget", "576/576"], "no thumbnail"),
        (flops, ["--attention", "flash"], "attention='flash'"),
        (flops, ["--text-tokens", "-1"], "text_tokens=-1"),
        (flops, ["--shape", "tiny", "--layers", "9"], "layers=9"),
        (flops, ["--measure"], "need one shape"),
        (flops, ["--shape", "qwen2.5-vl-7b", "--measure"], "cannot be measured yet"),
        (flops, ["--shape", "tiny", "--measure", "--dtype", "int8"], "dtype='int8'"),
        (flops, ["--output", "flops.txt"], "output='flops.txt'"),
    ],
)
def test_bad_input_is_one_line(command, flags, message, capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available() and "cuda:9" in flags:
        pytest.skip("needs a machine without a GPU")
    monkeypatch.chdir(tmp_path)
    assert guarded(lambda: command.main(flags)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_bad_counts():
    with pytest.raises(SaccadeError, match="images=0"):
        measure_generation(generation_model("tiny"), SkipVisionConfig(), PruningConfig(), images=0)


def test_lora_steps_with_and_without_casts(capsys):
    flags = ["--shape", "tiny", "--batch-size", "2", "--repeats", "1"]
    assert guarded(lambda: lora_casts.main(flags)) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[0].strip() for row in rows] == ["pruning only, no padding", "all tokens, no padding"]
    for *_, more, fewer in rows:
        assert float(more.split()[0]) > float(fewer.split()[0])
