"""Untrusted run folders: whatever is damaged, a command ends in one line or continues, and reads nothing outside."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from watching import watched

from saccade.cli.main import main
from saccade.dualspeed.checkpoint import MANIFEST_FILE
from saccade.errors import SaccadeError
from saccade.files import check_entries

FLAGS = {
    **{"per_device_train_batch_size": 2, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1},
    **{
        "dataset_rows": 8,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    },
}
EXAMPLES = 8 if settings.default.derandomize else 100
OTHERS = (None, [], {}, 3, -1, "x", [1], {"a": 1}, True, 1e300, "/etc/hostname", "../outside")
DAMAGES = ("remove", "empty", "cut", "flip", "garbage", "folder", "pipe", "link", "value", "value", "value")
WEIGHTS = (".safetensors", ".saccade", ".pt", ".pth")
FORBIDDEN = ("socket.connect", "os.system", "os.exec", "os.posix_spawn")


RECIPES = {"full": "tiny-digits/sft", "adapters": "tiny-digits/sft_lora", "skip": "tiny-digits/skip_vision"}


def train(folder, *more, kind="full"):
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value).lower())]
    return main(["train", RECIPES[kind], "--model", "tiny", "--output_dir", str(folder), *flags, *more])


ACTIONS = {
    "resume": lambda run, out, kind="full": train(run, "--max_steps", "3", "--resume", "auto", kind=kind),
    "resume by name": lambda run, out, kind="full": train(
        out, "--max_steps", "3", "--resume", str(run / "checkpoint-2"), kind=kind
    ),
    "export": lambda run, out, kind="full": main(["export", str(run), "--output", str(out)]),
    "eval": lambda run, out, kind="full": main(
        ["eval", str(run), "--num-samples", "2", "--output", str(out / "eval.json")]
    ),
    "report": lambda run, out, kind="full": main(["report", str(run), "--output", str(out)]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps that has ended, with both of its checkpoints and an evaluation."""
    return whole_run(tmp_path_factory, "full")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The same of adapters, and of Skip-Vision."""
    return {kind: whole_run(tmp_path_factory, kind) for kind in ("adapters", "skip")}


def whole_run(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, "--max_steps", "2", kind=kind) == 0
    assert main(["eval", str(folder), "--num-samples", "2", "--inference", "full"]) == 0
    return folder


def spots(value, path=()):
    """Where in a JSON value another may be put."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from spots(entry, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    value = deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = other
    return value


def harm(path: Path, how: str, pick: int, other, outside: Path) -> None:
    """Damage a file in the way that is called so; `pick` says where."""
    content = path.read_bytes()
    place = pick % max(1, len(content))
    if how == "value" and path.suffix == ".json":
        found = json.loads(content)
        everywhere = list(spots(found))
        path.write_text(json.dumps(replaced(found, everywhere[pick % len(everywhere)], other)))
        return
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        (outside / path.name).write_bytes(content)
        path.symlink_to(outside / path.name)
    elif how in ("empty", "cut"):
        path.write_bytes(content[: place if how == "cut" else 0])
    elif how != "remove":
        new = bytes(range(256)) if how == "garbage" or not content else bytes((content[place] ^ 1 << pick % 8,))
        path.write_bytes(content[:place] + new + content[place + 1 :])


def harmed_command(whole, tmp, capfd, kind, file, how, pick, other, action, forged):
    """Run a command on a copy of the run with a damaged file: one line or success, and nothing outside is touched.

    With `forged` there is no manifest, which anybody can write: nothing reveals that a file was changed.
    """
    run, out, outside = copied(whole, tmp)
    harm(run / file, how, pick, other, outside)
    if forged:
        shutil.rmtree(run / "checkpoint-2" / MANIFEST_FILE, ignore_errors=True)
        (run / "checkpoint-2" / MANIFEST_FILE).unlink(missing_ok=True)
    left = {path: path.read_bytes() for path in outside.iterdir()}
    capfd.readouterr()
    with watched() as events:
        status = ACTIONS[action](run, out, kind)
    lines = capfd.readouterr().err.strip().splitlines()
    assert status in (0, 1, 2)
    assert status == 0 or lines[-1].startswith("saccade: error: ")
    assert not any("Traceback" in line for line in lines)
    # Files of weights may be links where a folder is only read.
    linked = [outside] if how == "link" and Path(file).suffix in WEIGHTS else []
    stays_inside(events, run, out.parent, *linked)
    assert {path: path.read_bytes() for path in outside.iterdir()} == left
    shutil.rmtree(tmp)


def stays_inside(events, *folders) -> None:
    """No file in /etc or in another folder of the tests is opened, and nothing is connected to."""
    tests = folders[0].parent.parent
    for event, args in events:
        assert event not in FORBIDDEN, (event, args)
        if event == "open" and isinstance(args[0], (str, bytes)):
            place = Path(os.fsdecode(args[0])).resolve()
            assert not place.is_relative_to("/etc") or place.name in ("localtime", "mime.types", "host.conf"), place
            if place.is_relative_to(tests):
                assert any(place.is_relative_to(folder) for folder in folders), place


def copied(whole, tmp):
    run, out, outside = tmp / "run", tmp / "results" / "new", tmp / "outside"
    shutil.copytree(whole, run)
    outside.mkdir()
    out.parent.mkdir()
    return run, out, outside


FILES = (
    *("chat_template.jinja", "config.json", "dualspeed.json", "eval.json", "generation_config.json", "log.json"),
    *("mode_isolator.saccade", "model.safetensors", "processor_config.json", "run.json", "tokenizer.json"),
    *(
        "tokenizer_config.json",
        "checkpoint-2/config.json",
        "checkpoint-2/dualspeed.json",
        "checkpoint-2/manifest.json",
    ),
    *("checkpoint-2/mode_isolator.saccade", "checkpoint-2/model.safetensors", "checkpoint-2/optimizer.pt"),
    *("checkpoint-2/rng_state.pth", "checkpoint-2/scheduler.pt", "checkpoint-2/trainer_state.json"),
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@example("chat_template.jinja", "cut", 319, None, "eval", False)
@example("checkpoint-2/trainer_state.json", "value", 0, [], "resume", False)
@example("checkpoint-2/optimizer.pt", "flip", 900, None, "resume by name", True)
@example("dualspeed.json", "value", 0, 3, "export", False)
@example("log.json", "value", 0, {"log_history": [{"step": "x", "loss": []}]}, "report", False)
@given(
    file=st.sampled_from(FILES),
    how=st.sampled_from(DAMAGES),
    pick=st.integers(0, 1 << 20),
    other=st.sampled_from(OTHERS),
    action=st.sampled_from(sorted(ACTIONS)),
    forged=st.booleans(),
)
def test_whatever_is_damaged_a_command_ends_in_one_line_or_goes_on(
    whole, tmp_path_factory, capfd, file, how, pick, other, action, forged
):
    tmp = tmp_path_factory.mktemp("damaged")
    harmed_command(whole, tmp, capfd, "full", file, how, pick, other, action, forged)


OTHER_FILES = {
    "adapters": (
        *("adapter_config.json", "adapter_model.safetensors", "mode_isolator.saccade", "processor_config.json"),
        *("checkpoint-2/adapter_config.json", "checkpoint-2/adapter_model.safetensors"),
    ),
    "skip": ("skip_vision.saccade", "checkpoint-2/skip_vision.saccade", "config.json", "dualspeed.json"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=3 * EXAMPLES, suppress_health_check=list(HealthCheck))
@given(
    place=st.sampled_from([(kind, file) for kind, files in OTHER_FILES.items() for file in files]),
    how=st.sampled_from(DAMAGES),
    pick=st.integers(0, 1 << 20),
    other=st.sampled_from(OTHERS),
    action=st.sampled_from(sorted(ACTIONS)),
    forged=st.booleans(),
)
def test_whatever_is_damaged_in_adapters_and_skip_vision(
    others, tmp_path_factory, capfd, place, how, pick, other, action, forged
):
    kind, file = place
    tmp = tmp_path_factory.mktemp("damaged")
    harmed_command(others[kind], tmp, capfd, kind, file, how, pick, other, action, forged)


# Links

LINKED = ("config.json", "chat_template.jinja", "log.json", "dualspeed.json", "run.json", ".run.lock", "base")


@pytest.mark.parametrize("name", LINKED)
def test_a_run_writes_through_no_link(whole, tmp_path, capsys, name):
    """A folder that came from somebody else would have the final model written over any file of the user's."""
    run, _, outside = copied(whole, tmp_path)
    (outside / "mine").write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "mine")
    for flags in (["--resume", "auto"], ["--overwrite"]):
        capsys.readouterr()
        assert train(run, "--max_steps", "3", *flags) == 2
        assert f"{name} is a link that leads out of the folder" in capsys.readouterr().err
    assert (outside / "mine").read_text() == "mine"


@pytest.mark.parametrize("action", ["export", "eval", "report", "resume by name"])
def test_the_text_of_a_file_outside_gets_nowhere(whole, tmp_path, capsys, action):
    """A chat template that is a link to a secret would be exported, and published, with it."""
    run, out, outside = copied(whole, tmp_path)
    secret = outside / "secret"
    for folder in (run, run / "checkpoint-2"):
        secret.write_bytes((folder / "chat_template.jinja").read_bytes())
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.jinja").symlink_to(secret)
    with watched() as events:
        assert ACTIONS[action](run, out) == 2
    assert "chat_template.jinja is a link that leads out of the folder" in capsys.readouterr().err
    stays_inside(events, run, out.parent)


def test_links_that_are_no_harm(tmp_path):
    """Weights may be elsewhere, links may point inside, and the hub's cache consists of links to its own blobs."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (cache / "blobs" / "1").touch()
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_entries(snapshot, "model")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.json").touch()
    (plain / "config.json").symlink_to("a.json")
    (plain / "model.safetensors").symlink_to(cache / "blobs" / "1")
    check_entries(plain, "model")
    with pytest.raises(SaccadeError, match=r"model.safetensors is a link"):
        check_entries(plain, "output_dir", weights=True)
    (plain / "b.json").symlink_to(snapshot / "config.json")
    with pytest.raises(SaccadeError, match=r"b.json is a link"):
        check_entries(plain, "model")
