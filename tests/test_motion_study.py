"""Training on clips of digits that move: rows, plan, model, and the command at a size that learns nothing."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.motion.__main__ import Settings, main, plan_runs
from experiments.motion.clips import motion_clips
from experiments.motion.model import SIDE, build_motion_model
from experiments.motion.rows import clips_path, write_clips
from saccade.errors import SaccadeError
from saccade.evaluation.rows import file_rows
from saccade.tiny import load_tiny
from saccade.training import make_recipe

stock_processors = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="torchvision is not installed; `make test-video` has it"
)


def test_a_file_holds_the_clips_with_their_frames_and_rate(tmp_path: Path) -> None:
    write_clips(tmp_path, "validation", 3, 6)
    path = clips_path(tmp_path, "validation", 3, 6)
    made = path.stat().st_mtime_ns
    write_clips(tmp_path, "validation", 3, 6)
    assert path.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [path]
    stored = file_rows(str(path))
    for number, drawn in enumerate(motion_clips("validation", 3, frames=6)):
        row = stored[number]
        assert (row["kind"], row["answer"]) == (drawn["kind"], drawn["answer"])
        (clip,), (expected,) = row["videos"], drawn["videos"]
        assert clip.times == expected.times
        assert clip.frames.shape == expected.frames.shape
        # JPEG changes colours a little.
        assert np.abs(clip.frames.astype(float) - expected.frames).mean() < 12


def test_every_method_trains_with_one_budget_and_the_positions_of_frames(tmp_path: Path) -> None:
    runs = plan_runs(tmp_path, Settings(steps=2), ["all_tokens", "prune_only", "dualspeed"], range(2))
    assert [run.name for run in runs][:3] == ["all_tokens-seed0", "prune_only-seed0", "dualspeed-seed0"]
    assert len(runs) == 6
    for run in runs:
        (stage,) = run.stages
        assert (stage["positions"], stage["budget"], stage["video_frames"]) == ("original", "sample", 8)
        make_recipe(stage, run.name)
        ways = {entry["name"]: entry for entry in run.evaluation.inferences}
        assert ways["pruned"]["budget"] == "sample"
        assert ("pruned_isolator" in ways) == run.name.startswith("dualspeed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "all"], "method='all' is unknown"),
        (["--frames", "4"], "frames is 4: give an int of at least 5"),
        (["--split", "dev"], "split='dev' is unknown"),
        (["--clips", "0"], "clips=0: give at least 1"),
        (["--table"], "has no sweep"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        main([*words, "--output", str(tmp_path / "motion")])
    assert not (tmp_path / "motion").exists()


@stock_processors
def test_the_model_has_the_embedded_weights() -> None:
    tiny, tiny_processor = load_tiny()
    model, processor = build_motion_model()
    words = tiny_processor.tokenizer("which is first , 3 or 5 ?", return_tensors="pt").input_ids
    assert torch.equal(processor.tokenizer("which is first , 3 or 5 ?", return_tensors="pt").input_ids, words)
    vocabulary = tiny.config.text_config.vocab_size
    with torch.no_grad():
        assert torch.equal(model(input_ids=words).logits[..., :vocabulary], tiny(input_ids=words).logits)
    assert model.config.vision_config.image_size == SIDE
    weights, embedded = model.model.vision_tower.state_dict(), tiny.model.vision_tower.state_dict()
    (name,) = (name for name in embedded if name.endswith("position_embedding.weight"))
    for other, value in embedded.items():
        if other != name:
            assert torch.equal(weights[other], value)
    # Patch (0, 0) of 6 x 6 stands at (3, 3) of 12 x 12.
    assert torch.equal(weights[name][1], embedded[name][1 + 3 * 12 + 3])
    assert torch.equal(weights[name][36], embedded[name][1 + 8 * 12 + 8])


@stock_processors
def test_the_command_trains_and_evaluates(tmp_path: Path, capfd) -> None:
    sizes = ["--steps", "2", "--batch-size", "2", "--clips", "4", "--frames", "5"]
    command = [*sizes, "--methods", "all_tokens,dualspeed", "--output", str(tmp_path)]
    assert main(command) == 0
    assert "DualSpeed" in capfd.readouterr().out
    result = json.loads((tmp_path / "test" / "runs" / "dualspeed-seed0" / "result.json").read_text())
    full, pruned, isolated = (entry["mean_prompt_length"] for entry in result["evaluations"])
    # Five frames of nine tokens, of which a tenth stays.
    assert (round(full - pruned), round(isolated - pruned)) == (5 * 9 + 1 - 5, 4)
    assert main([*command, "--any-commit"]) == 0
    assert "found, not trained again" in capfd.readouterr().out
    # The models are those of the other split.
    stages = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    assert main([*command, "--split", "validation"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()} == stages
