"""Properties of every verb: exit statuses, errors in one line, quick start; and the verbs `reducers` and `env`."""

import argparse
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import saccade
from saccade.cli import main as main_module
from saccade.cli.early import (
    check_dataset,
    check_model,
    check_reducer,
    check_values,
    reducer_names,
    stage_to_come,
)
from saccade.cli.main import VERBOSE_TOO, VERBS, main
from saccade.errors import SaccadeError
from saccade.recipes import check_early, source_fields
from saccade.reducers import list_reducers
from saccade.training import ModelOptions

MISTYPED = """
train tiny-digit/sft | recipe 'tiny-digit/sft' does not exist: did you mean 'tiny-digits/sft'?
train out/sft | recipe 'out/sft' is a folder: give a YAML file or a shipped recipe, such as tiny-digits/sft; a model's
train llava-1.5-13b | is a folder: use one of llava-1.5-13b/pretrain, llava-1.5-13b/sft_full, llava-1.5-13b/sft_lora
train tiny-digits/sft --prune_ratoi 0.5 | unknown field 'prune_ratoi': did you mean 'prune_ratio'?
train tiny-digits/sft --learning-rat 1 | unknown field 'learning_rat': did you mean 'learning_rate'?
train tiny-digits/sft --dry-runn | unknown field 'dry_runn': did you mean 'dry_run'?
train tiny-digits/sft --reducer divprun | reducer='divprun' is unknown: did you mean 'divprune'?
train tiny-digits/sft --prune_ratio 1.5 | prune_ratio=1.5 is outside [0, 1)
train tiny-digits/sft --model out/sftt | model='out/sftt' is not a folder: did you mean 'out/sft'?
train tiny-digits/pretrain --dataset rowz.json | dataset='rowz.json' does not exist: did you mean 'rows.json'?
train tiny-digits/pretrain --launch dpd | launch='dpd' is unknown: did you mean 'ddp'?
train tiny-digits/sft | model='out/pretrain' does not exist: `saccade train tiny-digits/pretrain` writes it
train llava-1.5-7b/sft_lora --dataset rows.json | `saccade train llava-1.5-7b/pretrain` writes it
train tiny-digits/sft --launch ddp --dtype bf16 | dtype='bf16' is unknown: did you mean 'bfloat16'?
sweep tiny-digits/sft --grid dtype=float32,bf16 | dtype='bf16' is unknown: did you mean 'bfloat16'?
sweep tiny-digits/stf | recipe 'tiny-digits/stf' does not exist: did you mean 'tiny-digits/sft'?
sweep tiny-digits/sft --grid sft.prune_ratoi=0.8,0.9 | unknown field 'prune_ratoi': did you mean 'prune_ratio'?
sweep tiny-digits/sft --grid reducer=random,divprun | reducer='divprun' is unknown: did you mean 'divprune'?
sweep tiny-digits/sft --grid pretrain.prune_ratio=0.8,1.9 | prune_ratio=1.9 is outside [0, 1)
sweep tiny-digits/sft --split tets | split='tets' is unknown: did you mean 'test'?
sweep --table --output out/swep | output='out/swep' does not exist
eval out/sftt | model='out/sftt' is not a folder: did you mean 'out/sft'?
eval out/sft --inference full,prund | inference='prund' is unknown: did you mean 'pruned'?
eval out/sft --reducer divprun | reducer='divprun' is unknown: did you mean 'divprune'?
eval out/sft --prune-ratio 1.5 | prune_ratio=1.5 is outside [0, 1)
eval out/sft --keep_tokens 0 | keep_tokens=0: expected an integer of at least 1
eval out/sft --budget crp | budget='crp' is unknown: did you mean 'crop'?
eval out/sft --split tets | split='tets' is unknown: did you mean 'test'?
eval out/sft --dataset rowz.json | dataset='rowz.json' does not exist: did you mean 'rows.json'?
eval compare out/sftt out/sft | folder='out/sftt' does not exist: did you mean 'out/sft'?
eval compare out/sft out/sft --suite dualsped | suite='dualsped' is unknown: did you mean 'dualspeed'?
assemble --vision-tower tiny --language-model tiny --output o --crops anyrs | did you mean 'anyres'?
assemble --vision-tower tiny --language-model tiny --outpt o | unknown flag '--outpt': did you mean '--output'?
grow out/sftt --image-size 448 --output o | model='out/sftt' is not a folder: did you mean 'out/sft'?
data check rowz.json | dataset='rowz.json' does not exist: did you mean 'rows.json'?
data check qwen2.5-vl-7b/sft_lora | dataset='data/LLaVA-Instruct/llava_v1_5_mix665k.json' does not exist
data check rows.json --format lava | dataset format='lava' is unknown: did you mean 'llava'?
data check rows.json --prune-ratio 1.5 | prune_ratio=1.5 is outside [0, 1)
data check rows.json --max-length 5 | --max-length 5 counts tokens, which needs a processor: give --model
eval out/sft --inference full --reducer random | --reducer has no effect on --inference full
report out/sftt | folder='out/sftt' does not exist: did you mean 'out/sft'?
export out/sftt --output o | model='out/sftt' is not a folder: did you mean 'out/sft'?
export out/sft --output o --dtype flot32 | dtype='flot32' is unknown: did you mean 'float32'?
serve out/sftt | model='out/sftt' is not a folder: did you mean 'out/sft'?
serve out/sft --engine vlm | engine='vlm' is unknown: did you mean 'vllm'?
serve out/sft --prune-ratio 1.5 | error: prune_ratio=1.5 is outside [0, 1)
view phot.jpg | image='phot.jpg' does not exist: did you mean 'photo.jpg'?
view photo.jpg --reducer divprune,dp | reducer='dp' is unknown: did you mean 'dpp'?
view photo.jpg --model out/sftt | model='out/sftt' is not a folder: did you mean 'out/sft'?
demo --steps 0 | steps=0: give at least 1
"""
HERE = Path(__file__).parent
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Add a verb `probe` whose `run` is the given function."""

    def add(run: Callable[[argparse.Namespace], int], **attributes: object) -> None:
        module = types.ModuleType("saccade.cli.probe")
        module.EXAMPLES = "saccade probe FILE"
        module.add_arguments = _add_arguments
        module.run = run
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(main_module.VERBS, "probe", (module.__name__, "probe the command line"))

    return add


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--output")
    parser.add_argument("--dry-run", nargs="?", const="yes")


def raiser(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text[:-1]


def run_python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestDispatch:
    def test_help_lists_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {verb} " in out and text in " ".join(out.split()) for verb, (_, text) in VERBS.items())

    def test_no_help_is_wider_than_80_columns(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        for verb in ("", *VERBS):
            assert main([verb, "--help"] if verb else ["--help"]) == 0
            out = capsys.readouterr().out
            # A word that is wider than the line, such as a path, cannot be helped.
            wide = [line for line in out.splitlines() if len(line) > 80 and " " in line.strip()]
            assert wide == [], f"saccade {verb} --help"
            words = " ".join(re.sub(r" \\\n +", " ", out).split())
            examples = import_module(VERBS[verb][0]).EXAMPLES.strip() if verb else ""
            for line in re.sub(r" *\\\n *", " ", examples).splitlines():
                command, _, about = line.partition("  ")
                assert " ".join(command.split()) in words
                assert " ".join(about.split()) in words

    def test_no_verb_shows_the_help_and_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "verbs:" in capsys.readouterr().err

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"saccade {saccade.__version__}\n"

    def test_a_verbs_help_has_examples(self, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
        install(lambda args: 0)
        assert main(["probe", "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: saccade probe ")
        assert "Probe the command line." in out
        assert "examples:\n  saccade probe FILE" in out

    def test_the_status_is_that_of_the_verb(self, install: Install) -> None:
        install(lambda args: 7)
        assert main(["probe", "a"]) == 7

    @pytest.mark.parametrize("verb", ["reducers", "env"])
    def test_verbs_show_examples(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([verb, "--help"]) == 0
        assert f"examples:\n  saccade {verb}\n" in capsys.readouterr().out


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["frobnicate"], "unknown verb 'frobnicate': expected one of train, assemble, grow, data, "),
            (["evl"], "unknown verb 'evl': did you mean 'eval'?"),
            (["--frobnicate"], "--frobnicate"),
            (["probe"], "the following arguments are required: FILE (see `saccade probe --help`)"),
            (["probe", "a", "--speed", "9"], "unknown flag '--speed' (see `saccade probe --help`)"),
            (
                ["probe", "a", "--out", "b"],
                "unknown flag '--out': did you mean '--output'? (see `saccade probe --help`)",
            ),
            (["probe", "a", "--dry_rum"], "unknown flag '--dry_rum': did you mean '--dry-run'?"),
            (["probe", "a", "b"], "unknown argument 'b'"),
        ],
    )
    def test_bad_arguments_name_the_argument(
        self, install: Install, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
    ) -> None:
        install(lambda args: pytest.fail("the verb ran"))
        assert main(argv) == 2
        line = one_line(capsys.readouterr().err)
        assert line.startswith("saccade: error: ")
        assert message in line

    def test_a_saccade_error_is_one_line(self, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
        install(raiser(SaccadeError("keep=0 is\n  too few: give 1")))
        assert main(["probe", "a"]) == 2
        assert one_line(capsys.readouterr().err) == "saccade: error: keep=0 is too few: give 1"

    def test_an_interruption_is_130(self, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
        install(raiser(KeyboardInterrupt()))
        assert main(["probe", "a"]) == 130
        assert one_line(capsys.readouterr().err) == "saccade: interrupted"

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.ENOSPC, "no space left on the disk"),
            (errno.EACCES, "permission denied"),
            (errno.ENAMETOOLONG, "this name is too long"),
        ],
    )
    def test_a_disk_that_refuses_is_one_line(
        self, install: Install, capsys: pytest.CaptureFixture[str], number: int, message: str
    ) -> None:
        install(raiser(OSError(number, "what the system says", "/data/model.safetensors")))
        assert main(["probe", "a"]) == 1
        line = one_line(capsys.readouterr().err)
        assert line.startswith(f"saccade: error: {message}")
        assert "/data/model.safetensors" in line

    @pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EBADF, "bug")])
    def test_a_bug_keeps_its_traceback(self, install: Install, error: Exception) -> None:
        install(raiser(error))
        with pytest.raises(type(error), match="bug"):
            main(["probe", "a"])

    def test_a_closed_pipe_is_quiet(self) -> None:
        code = "import sys; from saccade.cli.main import main; sys.exit(main(['env']))"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 1


class TestOverrides:
    @pytest.mark.parametrize(
        "overrides",
        [[], ["--speed", "9"], ["-tp", "2"], ["--a=1", "--out", "x", "--b", "-1", "--c", "-1e-3"]],
    )
    def test_a_verb_may_take_flags_it_did_not_declare(self, install: Install, overrides: list[str]) -> None:
        seen: list[argparse.Namespace] = []
        install(lambda args: seen.append(args) or 0, PASS_UNKNOWN=True)
        assert main(["probe", "recipe.yaml", *overrides, "--output", "o"]) == 0
        assert (seen[0].file, seen[0].output, seen[0].overrides) == ("recipe.yaml", "o", overrides)

    def test_a_second_positional_is_still_an_error(self, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
        install(lambda args: pytest.fail("the verb ran"), PASS_UNKNOWN=True)
        assert main(["probe", "recipe.yaml", "other.yaml"]) == 2
        assert "unknown argument 'other.yaml'" in one_line(capsys.readouterr().err)


class TestFlags:
    @pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
    @pytest.mark.parametrize("passes", [False, True])
    def test_a_dash_and_an_underscore_are_the_same(self, install: Install, flag: str, passes: bool) -> None:
        seen: list[argparse.Namespace] = []
        install(lambda args: seen.append(args) or 0, PASS_UNKNOWN=passes)
        assert main(["probe", "a_b", flag]) == 0
        assert main(["probe", "a_b", f"{flag}=c_d"]) == 0
        assert [(args.file, args.dry_run) for args in seen] == [("a_b", "yes"), ("a_b", "c_d")]

    def test_verbose_goes_with_every_verb(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VERBOSE_TOO, "")
        seen: list[argparse.Namespace] = []
        install(lambda args: seen.append(args) or 0, PASS_UNKNOWN=True)
        assert main(["probe", "a", "--verbose"]) == 0
        assert seen[0].overrides == []
        assert os.environ[VERBOSE_TOO] == "1"

    @pytest.mark.parametrize(("flag", "hidden"), [("--verbose", False), ("--dry-run", True)])
    def test_warnings_of_dependencies_are_for_the_verbose(self, flag: str, hidden: bool) -> None:
        code = (
            "import sys, types, warnings; from saccade.cli import main as m; "
            "probe = types.ModuleType('probe'); probe.EXAMPLES = ''; "
            "probe.add_arguments = lambda parser: parser.add_argument('--dry-run', action='store_true'); "
            "kinds = lambda: [(kind, what) for kind, _, what, *_ in warnings.filters]; "
            "probe.run = lambda args: print(('ignore', FutureWarning) in kinds()) or 0; "
            "sys.modules['probe'] = probe; m.VERBS['probe'] = ('probe', 'a probe'); "
            f"sys.argv = ['saccade', 'probe', '{flag}']; m.main()"
        )
        assert run_python(code).strip() == str(hidden)

    def test_where_images_may_be_fetched_it_can_be_said_where_they_are_kept(self) -> None:
        found = {}
        for verb, (home, _) in VERBS.items():
            parser = main_module.Parser(prog=verb)
            import_module(home).add_arguments(parser)
            found[verb] = {"--image-urls", "--image-cache"} & parser.flags()
        assert {verb for verb, flags in found.items() if flags} == {"data", "eval"}
        assert all(len(flags) == 2 for flags in found.values() if flags)


class TestQuickStart:
    def test_what_is_mistyped_is_told_before_anything_is_imported(self, tmp_path: Path) -> None:
        (tmp_path / "out" / "sft").mkdir(parents=True)
        (tmp_path / "out" / "sft" / "pruning_config.json").write_text("{}")
        for name in ("rows.json", "photo.jpg"):
            (tmp_path / name).write_text("[]")
        cases = [line.split(" | ") for line in MISTYPED.strip().splitlines()]
        code = (
            "import io, sys; from contextlib import redirect_stderr; from saccade.cli.main import main\n"
            f"for words, message in {cases!r}:\n"
            "    told = io.StringIO()\n"
            "    with redirect_stderr(told): status = main(words.split())\n"
            "    slow, told = {'torch', 'transformers', 'trl'} & set(sys.modules), told.getvalue()\n"
            "    assert status == 2 and not slow and message in told, (words, status, slow, told)\n"
            "print('all')"
        )
        assert run_python(code, cwd=tmp_path) == "all\n"

    def test_the_reducers_found_in_the_source_are_those_there_are(self) -> None:
        assert reducer_names() == set(list_reducers())

    def test_what_may_be_right_passes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for folder, name in (("out/sft", "pruning_config.json"), ("Qwen/Qwen2-VL-2B", "config.json")):
            Path(folder).mkdir(parents=True)
            (Path(folder) / name).write_text("{}")
        for model in ("tiny", "out/sft", "Qwen/Qwen2-VL-7B", "llava-hf/llava-1.5-7b-hf", "gpt2", None):
            check_model(model)
        for model in ("out/sftt", "./new", "/none", "out/sft/checkpoint-3"):
            with pytest.raises(SaccadeError, match="is not a folder"):
                check_model(model)
        check_dataset("someone/rows")
        for model in ("tiny", "out/sft", "out/other", "llava-hf/llava-1.5-7b-hf", None):
            assert stage_to_come("tiny-digits/sft", model) is None
        check_values({"prune_ratio": "1e-1", "keep_tokens": None, "reducer": None, "learning_rate": 3})
        monkeypatch.setattr("saccade.cli.early.entry_points", lambda group: [group])
        check_reducer("from-a-plugin")

    @pytest.mark.interfaces
    def test_the_names_found_in_the_source_are_those_of_the_classes(self) -> None:
        owners = (ModelOptions, saccade.DualSpeedConfig)
        fields = {entry.name for owner in owners for entry in dataclasses.fields(owner) if entry.init}
        assert fields <= source_fields()
        # Nothing else may be suggested or let through, such as a parameter of a function in these files.
        assert {name for name in source_fields() - fields if not name.startswith("_")} == set()

    def test_what_is_not_found_in_the_source_is_left_to_the_whole_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("saccade.recipes.FIELD_FILES", ("saccade/training/models.py", "saccade/gone.py"))
        assert check_early("tiny-digits/sft", ["--prune_ratoi", "0.5"])["prune_ratoi"] == 0.5

    def test_help_imports_no_torch(self) -> None:
        code = (
            "import sys; from saccade.cli.main import VERBS, main; "
            "[main(argv) for argv in (['--help'], *([verb, '--help'] for verb in VERBS))]; "
            "print({'torch', 'numpy', 'rich', 'matplotlib', 'transformers'} & set(sys.modules))"
        )
        assert run_python(code).splitlines()[-1] == "set()"

    def test_reducers_imports_no_transformers(self) -> None:
        code = (
            "import sys; from saccade.cli.main import main; main(['reducers']); "
            "print({'transformers', 'trl', 'matplotlib'} & set(sys.modules))"
        )
        assert run_python(code).splitlines()[-1] == "set()"


class TestReducers:
    def test_the_table_names_every_reducer(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reducers"]) == 0
        out = capsys.readouterr().out
        assert all(f"\n{name} " in out for name in list_reducers())

    def test_json_describes_every_reducer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "reducers.json"
        assert main(["reducers", "--json", "--output", str(target)]) == 0
        entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
        assert json.loads(target.read_text()) == list(entries.values())
        assert sorted(entries) == list_reducers()
        for name, entry in entries.items():
            assert entry["kind"] in ("select", "merge", "resize"), name
            assert len(entry["description"]) > 20, name
        assert entries["divprune"]["kind"] == "select"
        assert entries["avgpool"]["kind"] == "merge"
        assert entries["random"]["options"] == {"seed": 0}


class TestEnv:
    def test_lines_name_versions(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env"]) == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert {"saccade", "python", "torch", "transformers", "trl", "cpu", "gpu"} <= set(names)

    def test_json_goes_to_both(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "folder" / "env.json"
        assert main(["env", "--json", "--output", str(target)]) == 0
        assert json.loads(target.read_text()) == json.loads(capsys.readouterr().out)

    def test_an_output_that_is_a_folder_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env", "--output", str(tmp_path)]) == 2
        assert "exists and is not a file" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval.json", ["eval", "tiny", "--dataset", "eval.json"]),
        ("view.png", ["view", "view.png"]),
        ("data_check.json", ["data", "check", "./data_check.json"]),
        ("my.yaml", ["train", "my.yaml", "--dry-run", "--output", "my.yaml"]),
    ],
)
def test_no_command_writes_over_what_it_reads(name, words, tmp_path, monkeypatch, capsys):
    """Also where the output is a default."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("mine")
    assert main(words) == 2
    assert f"{name}' is the file that the command reads: give another --output" in capsys.readouterr().err
    assert Path(name).read_text() == "mine"
