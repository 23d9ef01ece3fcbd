"""README.md: short, true by the pages and files that it sums up, and its commands and code run."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import yaml
from test_docs_pages import run_line

import saccade
from saccade.cli.main import VERBS, main
from saccade.data import digit_scenes
from saccade.demo.run import FULL, SHORT, plan_runs
from saccade.errors import SaccadeError
from saccade.evaluation.digits import collate_prompts
from saccade.families import get_family
from saccade.reducers import list_reducers
from saccade.reducers.budget import keep_count
from saccade.serving import start

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
DEMO = (ROOT / "docs" / "demo.md").read_text()
FAMILIES = (ROOT / "docs" / "families.md").read_text()
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without the line below its heading row."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [
        [
            [cell.strip() for cell in row[1:-1].split(" | ")]
            for row in one.splitlines()
            if not re.match(r"\|[ :|-]+$", row)
        ]
        for one in found
    ]


def demo_rows() -> dict[tuple[str, str], dict[str, str]]:
    """The means of the full demo's table, by training and positions."""
    heading, *rows = tables(DEMO[: DEMO.index("## Compared with the paper")])[0]
    assert heading[0] == "training"
    return {
        (row[0], row[1]): {name: cell.split(" (")[0] for name, cell in zip(heading, row, strict=True)} for row in rows
    }


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


LOWEST = "lowest task's share"


def smol_rows() -> dict[tuple[str, str], dict[str, str]]:
    """The means of the testbed's first table, by training and by what is answered from."""
    text = (ROOT / "docs" / "testbed-results.md").read_text()
    heading, *rows = tables(text[text.index("## What was measured") :])[0]
    assert heading[:2] == ["training", "answers from"]
    return {
        (row[0], row[1]): {name: cell.split(" (")[0] for name, cell in zip(heading, row, strict=True)} for row in rows
    }


def test_it_is_short_and_begins_with_what_was_and_was_not_measured() -> None:
    assert len(README.split()) <= 900
    first = " ".join("\n".join(README.splitlines()[:10]).split())
    for words in ("fine-tune or serve vision-language models", "three seeds", "on a CPU", "Nothing was measured"):
        assert words in first


def test_its_first_figures_are_those_of_the_testbed() -> None:
    rows = smol_rows()
    every, last, pruned = (
        rows[key]
        for key in (
            ("all tokens", "all tokens"),
            ("fast, then few slow, longer", "all tokens"),
            ("fast, then few slow, longer", "pruned"),
        )
    )
    dualspeed = rows["DualSpeed", "all tokens"]
    (mean,) = (name for name in every if name.startswith("mean"))
    seconds = [float(row["CPU time of training"].removesuffix(" s")) for row in (last, dualspeed, every)]
    assert [row["seeds"] for row in (every, last, pruned, dualspeed)] == ["3"] * 4
    for words in (
        f"Trained on all 576 visual tokens of a picture, it answers {every[mean]} of the test questions correctly.",
        f"it answers {pruned[mean]} correctly from that tenth and {last[mean]} from all tokens, "
        f"after {round(100 * seconds[0] / seconds[2])} % of the CPU time",
        "(three seeds, on a CPU,",
        f"on the lowest task, {pruned[LOWEST].removesuffix(' %')} and {last[LOWEST]} of all-token accuracy",
        f"DualSpeed as published, in {round(100 * seconds[1] / seconds[2])} % of the time, "
        f"reached a share of {dualspeed['share']} from all tokens, not the paper's 99 %",
    ):
        assert words in WORDS, words
    alone = rows["all tokens", "pruned"][mean]
    assert f"the model trained on all of them answers {alone} correctly, the preset's {pruned[mean]}." in WORDS
    assert "![Accuracy over the CPU time of training](docs/images/smol_trade_off.png)" in README


def test_its_figures_of_the_demo_are_those_of_its_page(model, processor) -> None:
    dualspeed = demo_rows()["DualSpeed", "compact"]
    said = (
        f"{dualspeed['share of all-token']} of the accuracy of all-token training; its training steps are "
        f"{float(dualspeed['of steps'].removesuffix('x')):.1f} times as fast"
    )
    assert said in WORDS
    assert FULL.slow_probability == 0.1
    row = digit_scenes("sft", "test", 1, kinds=["read"])[0]
    tokens = get_family(model).encode(collate_prompts(processor, [row])).context.features.shape[1]
    assert f"{keep_count(tokens, FULL.prune_ratio)} of {tokens} visual tokens in nine steps of ten" in WORDS
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"A LLaVA of {size / 1e6:.1f} million parameters" in WORDS


def test_its_figures_of_skip_vision_are_those_of_the_study() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    title = "Both methods, alone and together: accuracy, training time and inference cost"
    heading, *rows = tables(page[page.index(f"## {title}") :])[0]
    every, skip = (
        {name: cell.split()[0] for name, cell in zip(heading, row, strict=True)} for row in (rows[0], rows[-2])
    )
    assert rows[-2][0] == "Skip-Vision 100/156"
    share = round(100 * float(skip["CPU time of training"]) / float(every["CPU time of training"]))
    assert skip["share"] == str(share)
    said = f"[{share} % of the training time and operations per prompt that all tokens take](docs/results.md#"
    assert said + re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") + ")" in README


def test_its_figures_of_serving_are_those_of_the_benchmark() -> None:
    page = (ROOT / "docs" / "serve.md").read_text()

    def gains(after: str) -> list[float]:
        first, rate = tables(page[page.index(after) :])[:2]
        row = "plug-in, ratio 0.9"
        return [float(next(cells for cells in table if cells[0] == row)[2].split()[0]) for table in (first, rate)]

    soon, many = gains("**8 requests at a time: the first token**")
    said = f"first token {soon:.1f} times as soon, {many:.1f} times as many requests"
    assert f"![vLLM at ratio 0.9: {said}](docs/images/serving_576.png)" in README
    assert f"vLLM's first token comes {soon:.1f} times as soon for eight requests, and" in WORDS
    said = f"first token {soon:.1f} times as soon as from vLLM on all tokens, {many:.1f} times as many"
    assert said in " ".join(page.split())
    soon, many = gains("<!-- bench: 2880 -->")
    assert f"on a tenth of 2,928, {soon:.1f} times for one" in WORDS
    said = f"first token comes {soon:.1f} times as soon and {many:.1f} times as many requests"
    assert said in " ".join(page.split())


def test_it_says_of_the_demo_how_long_it_took_and_what_it_trains() -> None:
    short = DEMO[DEMO.index("## The short demo") :]
    minutes = re.search(r"took ([\d.]+) minutes on two cores, without set-up", " ".join(short.split()))[1]
    start = (ROOT / "docs" / "start.md").read_text()
    assert f"compares them: took {minutes} minutes on two server cores" in WORDS
    assert f"[took {minutes} minutes](demo.md#the-short-demo) on two cores, without set-up" in " ".join(start.split())
    assert f"{SHORT.pretrain_steps} and {SHORT.sft_steps} steps of {SHORT.batch_size} rows" in short
    assert f"tests on {SHORT.test_scenes} scenes" in " ".join(short.split())
    runs = plan_runs(SHORT, seeds=1, full=False)
    assert f"trains a tiny model {NUMBERS[len(runs)]} times" in WORDS
    heading, *rows = tables(short)[0]
    assert len(rows) == len(runs)
    accuracy = {row[0]: float(row[heading.index("accuracy, all tokens")].removesuffix(" %")) for row in rows}
    assert accuracy["pruning only"] < accuracy["DualSpeed"] - 10


def test_its_models_and_reducers_are_all_that_there_are_and_work_together() -> None:
    models, reducers = tables(README)
    matrix = next(table for table in tables(FAMILIES) if "divprune" in table[0])
    tested = {row[0] for row in matrix[1:]}
    # LLaVA-NeXT-Video is not: it was tried with videos only.
    known = [row[1] for row in tables(FAMILIES)[0][1:] if row[0] in tested]
    assert sorted(name for row in models[1:] for name in row[1].split(", ")) == sorted(known)
    named = [name for row in reducers[1:] for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(named) == sorted(list_reducers())
    heading, *rows = matrix
    assert len(rows) == len(known)
    assert set(heading[1:]) == set(named) - {"none"}
    assert {cell for row in rows for cell in row[1:]} <= {str(number) for number in range(1, 100)}


def no_engine(engine: str | None) -> str:
    raise SaccadeError("reached the engine")


def test_its_lines_for_the_shell_run(monkeypatch, tmp_path, capsys) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.chdir(tmp_path)
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 7
    for command in (each for line in lines for each in line.split(" && ")):
        program, *words = shlex.split(command)
        if program == "pip":
            extras = re.search(r"\[(\w+)\]", words[-1])
            assert words[0] == "install"
            assert extras is None or extras[1] in project["optional-dependencies"]
        elif program == "make":
            subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)
        elif words[0] == "serve":
            # No engine is at hand: the folder has to pass every check before that of the engine.
            monkeypatch.setattr(start, "installed_engine", no_engine)
            assert main(["out/sft" if word == "FOLDER" else word for word in words]) == 2
            assert capsys.readouterr().err.endswith("\nsaccade: error: reached the engine\n")
        else:
            run_line(command)


def test_its_two_lines_of_pruning_run(model, processor) -> None:
    (code,) = [block for block in blocks("python") if "apply_pruning" in block]
    row = digit_scenes("sft", "test", 1, kinds=["read"])[0]
    names = {"model": model, "inputs": collate_prompts(processor, [row])}
    lengths = []
    forward = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    exec(code, names)
    forward.remove()
    # Original positions need a mask that `generate` does not discard, for which there is one column of padding.
    assert lengths[0] == names["inputs"]["input_ids"].shape[1] - 130 + 1


def test_the_page_of_commands_names_each_verb() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"^\| `saccade (\w+)", page, re.MULTILINE)) == set(VERBS)


def test_the_citation_file() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == saccade.__version__
    assert {"message", "title", "authors", "type", "license"} <= cited.keys()
    papers = set(re.findall(r"https://arxiv.org/abs/[\d.]+", README))
    assert len(papers) == 2
    assert {entry["url"] for entry in cited["references"]} == papers
    for entry in cited["references"]:
        assert {"type", "title", "authors", "doi"} <= entry.keys()
        assert entry["doi"].endswith(entry["url"].rpartition("/")[2])
