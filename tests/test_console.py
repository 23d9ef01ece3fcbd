"""What `saccade train` says while it trains: nobody has to read a mapping, and nothing is wider than a terminal."""

import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO

import pytest
from transformers import PrinterCallback, ProgressCallback

from saccade.cli.main import main
from saccade.report import lines
from saccade.training import load_recipe, train_recipe
from saccade.training.console import Console, duration, log_line

FLAGS = ["--dataset_rows", "8", "--max_steps", "4", "--logging_steps", "2", "--per_device_train_batch_size", "2"]
FLAGS += ["--save_strategy", "no", "--use_cpu", "true", "--slow_probability", "0.5", "--schedule", "stratified"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The folder and the standard output of a run."""
    folder = tmp_path_factory.mktemp("console") / "run"
    with redirect_stdout(StringIO()) as text:
        assert main(["train", "tiny-digits/sft", "--model", "tiny", "--output_dir", str(folder), *FLAGS]) == 0
    return folder, text.getvalue().splitlines()


def test_a_run_opens_with_what_it_will_do(said):
    folder, lines = said
    text = "\n".join(lines)
    log = json.loads((folder / "log.json").read_text())["log_history"]
    steps = {mode: int(log[-2][f"steps_{mode}"]) for mode in ("fast", "slow")}
    assert sum(steps.values()) == 4
    assert "model   tiny: 829k parameters, 497k of them trained" in text
    assert "data    digits, the embedded scenes: 8 rows, 144 visual tokens in the first" in text
    assert f"fast: {steps['fast']} steps, 10 % of the visual tokens (14 of 144) by divprune, with the isolator" in text
    assert f"slow: {steps['slow']} steps, all visual tokens, taught by fast" in text
    assert "steps   4 of 2 rows, on one cpu" in text
    assert f"output  {folder}" in text


def test_each_log_is_one_line_of_the_numbers_in_the_log(said):
    folder, lines = said
    log = [entry for entry in json.loads((folder / "log.json").read_text())["log_history"] if "loss" in entry]
    told = [line for line in lines if "  loss " in line]
    assert [line.split()[0] for line in told] == ["2/4", "4/4"]
    for entry, line in zip(log, told, strict=True):
        for mode in ("fast", "slow"):
            assert (f"{entry[f'loss_{mode}']:.3f} {mode}" in line) if f"loss_{mode}" in entry else (mode not in line)
        assert "tokens/s" in line
        assert len(line) <= 100
    assert re.search(r"\d:\d\d, \d:\d\d to go$", told[0])
    assert not any("{" in line for line in lines)


def test_a_run_ends_with_what_to_do_next(said):
    folder, lines = said
    assert any(line.startswith("trained for 0:") and "mean loss" in line for line in lines)
    at = lines.index("next:")
    commands = [line.split("  ")[1] for line in lines[at + 1 :]]
    assert commands == [
        f"saccade report {folder}",
        f"saccade eval {folder}",
        f"saccade export {folder} --output {folder}-export",
    ]


def test_what_to_do_next_can_be_pasted_and_works(tmp_path, capsys):
    """Where a shell would split the folder's name, and where no loss was logged, of which a report has no page."""
    folder = tmp_path / "my run"
    words = ["--output_dir", str(folder), *FLAGS, "--max_steps", "1"]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line.strip().split("  ")[0]) for line in lines[lines.index("next:") + 1 :]]
    assert commands == [
        ["saccade", "eval", str(folder)],
        ["saccade", "export", str(folder), "--output", f"{folder}-export"],
    ]


def test_one_of_a_thing_is_no_plural(tmp_path, capsys):
    flags = ["--max_steps", "1", "--dataset_rows", "1", "--per_device_train_batch_size", "1"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--prune_ratio", "0"]
    words = ["--output_dir", str(tmp_path / "run"), *FLAGS, *flags]
    assert main(["train", "tiny-digits/sft", "--model", "tiny", *words]) == 0
    text = capsys.readouterr().out
    assert ": 1 row, 144 visual tokens in the first" in text
    assert ": 1 step, " in text
    assert ": 1 steps" not in text
    assert "steps   1 of 1 row, on" in text
    assert "a checkpoint every step\n" in text


def test_the_stock_printers_are_gone(tmp_path):
    trainer = train_recipe(load_recipe("tiny-digits/sft", [*FLAGS, "--model", "tiny", "--output_dir", str(tmp_path)]))
    kinds = [type(one) for one in trainer.callback_handler.callbacks]
    assert kinds.count(Console) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds)


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 1.23456}, "loss 1.235"),
        ({"loss": 1.0, "loss_fast": 1.0, "speedup_tokens": 4.306}, "loss 1.000 fast  4.31x by token counts"),
        (
            {"loss": 1.0, "loss_fast": 0.5, "loss_slow": 1.5, "kl": 0.0123, "speedup": 2.5, "speedup_tokens": 4.0},
            "loss 0.500 fast, 1.500 slow, KL 0.012  2.50x as fast",
        ),
        (
            {"loss": 1.0, "tokens_per_second": 12_345.0, "rows_cut": 3.0},
            "loss 1.000  12.3k tokens/s  3 rows cut to fit",
        ),
    ],
)
def test_log_lines(logs, line):
    assert log_line(logs, ("fast", "slow")) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_on_a_narrow_terminal_a_log_is_one_line_and_no_word_breaks(monkeypatch):
    logs = {
        "loss": 1.0,
        "loss_fast": 0.913,
        "loss_slow": 1.511,
        "kl": 1.308,
        "tokens_per_second": 13.6e3,
        "speedup": 2.1,
    }
    line = f"1000/1200  {log_line(logs, ('fast', 'slow'), short=True)}  10:00, 10:00 to go"
    assert "loss 0.91 fast, 1.51 slow  13.6k tokens/s  2.10x" in line
    assert len(line) < 80
    assert "KL 1.308" in log_line(logs, ("fast", "slow"))
    text = "modes   fast: 20 steps, 10 % of the visual tokens (14 of 144) by divprune, with the isolator"
    monkeypatch.setattr(lines, "room", lambda: None)
    assert lines.wrapped(text, 8) == text
    monkeypatch.setattr(lines, "room", lambda: 79)
    first, second = lines.wrapped(text, 8).splitlines()
    assert len(first) < 80
    assert second.startswith(" " * 8)
    assert [*first.split(), *second.split()] == text.split()
