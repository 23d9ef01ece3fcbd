"""The pruning options on the command line: the same for every verb, and none is lost on the way."""

from types import SimpleNamespace

import pytest

import saccade.evaluation
import saccade.serving.start
import saccade.training
from saccade.cli.main import main
from saccade.cli.pruning_flags import FLAGS
from saccade.reducers import PruningConfig
from saccade.reducers.config import PRUNING_OPTIONS

GIVEN = {
    "reducer": ("cdpruner", "cdpruner"),
    "reducer_options": ('{"precision": "float64"}', {"precision": "float64"}),
    "prune_ratio": ("0.25", 0.25),
    "keep_tokens": ("9", 9),
    "budget": ("image", "image"),
    "adaptive": (None, True),
    "fit_length": ("300", 300),
    "patch_tolerance": ("0.05", 0.05),
    "newlines": ("drop", "drop"),
    "positions": ("original", "original"),
}
"""Each option as it is written after its flag, and as the config has it; none is the default."""


def words(*names):
    return [word for name in names for word in (f"--{name.replace('_', '-')}", GIVEN[name][0]) if word is not None]


def test_there_is_a_flag_for_each_option():
    assert [*FLAGS] == [*GIVEN] == [*PRUNING_OPTIONS]


@pytest.mark.parametrize("count", ["prune_ratio", "keep_tokens"])
def test_eval_evaluates_what_the_flags_say(count, tmp_path, monkeypatch):
    seen = []
    result = {"inference": "pruned", "accuracy_by_kind": {}, "accuracy": 0.5, "mean_prompt_length": 9.0}
    monkeypatch.setattr(saccade.training, "load_to_run", lambda options: (SimpleNamespace(device="cpu"), None))
    monkeypatch.setattr(saccade.evaluation, "evaluate_inferences", lambda *given: seen.append(given[3]) or [result])
    names = [name for name in GIVEN if name not in {"prune_ratio", "keep_tokens"} - {count}]
    output = ["--num-samples", "1", "--output", str(tmp_path / "eval.json")]
    assert main(["eval", "tiny", "--inference", "pruned", *words(*names), *output]) == 0
    ((inference,),) = seen
    assert inference.pruning == PruningConfig(**{name: GIVEN[name][1] for name in names})


def test_serve_serves_what_the_flags_say(monkeypatch, tmp_path):
    # Of its own: whether one lies in the clone depends on which tests ran before.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    seen = []
    monkeypatch.setattr(
        saccade.serving.start, "serve_folder", lambda *given, **where: seen.append(SimpleNamespace(**locals())) or 0
    )
    names = [name for name in GIVEN if name != "keep_tokens"]
    assert main(["serve", "out", *words(*names), "--no-isolator", "--name", "mine", "--seed", "3"]) == 0
    (call,) = seen
    assert call.given == ("out", {name: GIVEN[name][1] for name in names} | {"isolator": None}, ["--seed", "3"])
    assert call.where["name"] == "mine"
    assert main(["serve", "out"]) == 0
    assert seen[1].given == ("out", None, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--reducer-options", "precision=float64"], "argument --reducer-options: 'precision=float64' is not JSON"),
        (["--reducer-options", "[1]"], "reducer_options=[1]: give a mapping"),
        (["--reducer", "cdpruner", "--reducer-options", '{"precise": 1}'], "precise"),
    ],
)
def test_options_that_are_none_are_one_line(given, message, capsys):
    assert main(["eval", "tiny", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
