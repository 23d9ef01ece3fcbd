"""`saccade export --push-to-hub` and `push_to_hub` in training: the real client against a hub on loopback that
keeps what it is given."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import make_trainer
from huggingface_hub import HfApi, constants
from transformers import TrainerCallback

from saccade import DualSpeedTrainer, SaccadeError
from saccade.cli.main import main
from saccade.dualspeed.checkpoint import find_fault
from saccade.dualspeed.folder import PARTIAL_DIR
from saccade.tiny import build_tiny_llava
from saccade.training import export
from saccade.training.hub import check_hub, push_folder

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """The few requests of the hub's that an upload of small files consists of."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.refuses_commits = False
        self.exists = False
        self.fails = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.path == "/api/whoami-v2" and known:
            return self.answer(200, {"name": "me", "type": "user"})
        if self.path.startswith("/api/models/me/") and self.server.fails:
            return self.answer(500, {"error": "down"})
        if self.path.startswith("/api/models/me/") and self.server.exists:
            return self.answer(200, {"id": "me/model", "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        return self.answer(404 if known else 401, {"error": "no"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.url}/me/model"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": file["path"], **regular} for file in files]})
        if self.server.refuses_commits:
            return self.answer(403, {"error": "read-only"})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.server.url}/me/model/commit/{'1' * 40}"
        return self.answer(200, {"commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})

    def answer(self, status: int, content: dict) -> None:
        self.send_response(status)
        text = json.dumps(content).encode()
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def exported(monkeypatch, tmp_path: Path) -> Path:
    """A folder that `export_model` would have written, from the folder `run`."""
    folder = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()

    def write(source: str, output: str, dtype: str, size: str) -> dict:
        folder.mkdir()
        (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# out\n")
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        names = ["README.md", "model.safetensors"]
        facts = {"base_model": None, "parameters": 1, "dtype": "float32", "own_classes": [], "notes": []}
        return {"output": output, **facts, "files": names}

    monkeypatch.setattr(export, "export_model", write)
    return folder


def test_what_was_exported_is_on_the_hub(hub: Hub, exported: Path, capsys) -> None:
    words = ["export", "run", "--output", str(exported), "--push-to-hub", "me/model", "--private"]
    assert main(words) == 0
    assert hub.files == {path.name: path.read_bytes() for path in exported.iterdir()}
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("model", "me")
    # By version of huggingface_hub.
    assert made.get("private") or made.get("visibility") == "private"
    assert f"published at {hub.url}/me/model" in capsys.readouterr().out


def test_private_does_not_upload_to_what_is_public(hub: Hub, exported: Path, capsys) -> None:
    hub.exists = True
    words = ["export", "run", "--output", str(exported), "--push-to-hub", "me/model"]
    assert main([*words, "--private"]) == 2
    assert "push_to_hub='me/model' is public" in capsys.readouterr().err
    assert not exported.exists()
    hub.fails = True
    assert main([*words, "--private"]) == 2
    assert f"push_to_hub='me/model': {hub.url} did not say whether it is private" in capsys.readouterr().err
    hub.fails = False
    assert main(words) == 0


def test_a_refused_upload_keeps_the_folder(hub: Hub, exported: Path, capsys) -> None:
    hub.refuses_commits = True
    assert main(["export", "run", "--output", str(exported), "--push-to-hub", "me/model"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("saccade: error: push_to_hub='me/model' failed (")
    assert error.endswith(f"the model is in {exported}: upload it with `hf upload me/model {exported}`")
    assert (exported / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [("a b/c", "is not the name of a repository"), ("model", "has no user or organisation"), ("a/b/c", "is not the")],
)
def test_a_wrong_name_is_told(name: str, message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        check_hub(name)


def test_a_stranger_is_told_before_anything_is_exported(hub: Hub, exported: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    assert main(["export", "run", "--output", str(exported), "--push-to-hub", "me/model"]) == 2
    assert "did not say who you are" in capsys.readouterr().err
    assert not exported.exists()


def test_offline_and_private_without_a_place(exported: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SaccadeError, match="HF_HUB_OFFLINE is set"):
        check_hub("me/model")
    assert main(["export", "run", "--output", str(exported), "--private"]) == 2
    assert "private=true is for push_to_hub only" in capsys.readouterr().err


def test_a_hub_that_is_not_there(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SaccadeError, match=r"push_to_hub='me/model' failed .* `hf upload me/model"):
        push_folder(tmp_path, "me/model")


@pytest.fixture
def uploads(hub: Hub, monkeypatch) -> threading.Event:
    """Uploads of a trainer look at their folder once this is set."""
    begin, prepare = threading.Event(), HfApi._prepare_upload_folder_additions

    def when_begun(*args, **options):
        assert begin.wait(60)
        return prepare(*args, **options)

    monkeypatch.setattr(HfApi, "_prepare_upload_folder_additions", when_begun)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # has the address of the hub
    yield begin
    begin.set()


def pushing(model, processor, folder: Path, strategy: str, **options) -> DualSpeedTrainer:
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    saving |= {"hub_model_id": "me/model", "hub_strategy": strategy, "hub_token": TOKEN}
    return make_trainer(model, processor, folder, **{**saving, **options})


def failures(trainer: DualSpeedTrainer) -> list[BaseException | None]:
    """What each upload since the last pause failed with."""
    return [job.exception() for job in trainer.push_in_progress.jobs]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_checkpoints_are_pushed_while_training_goes_on(hub, uploads, model, processor, tmp_path, strategy) -> None:
    """Every upload reads its folder after the last step, when `save_total_limit` would have removed two of them."""
    trainer = pushing(model, processor, tmp_path, strategy, hub_always_push=True, save_total_limit=1)

    class Slow(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            uploads.set()

    trainer.add_callback(Slow())
    trainer.train()
    whole = strategy == "checkpoint"
    assert failures(trainer) == [None] * (6 if whole else 3)
    newest = tmp_path / "checkpoint-3"
    for name in ("model.safetensors", "config.json", "mode_isolator.saccade", "pruning_config.json"):
        assert hub.files[name] == (newest / name).read_bytes(), name
    assert "README.md" in hub.files
    last = {name: content for name, content in hub.files.items() if name.startswith("last-checkpoint/")}
    written = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert last == ({f"last-checkpoint/{name}": content for name, content in written.items()} if whole else {})
    there = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert there == (["checkpoint-1", "checkpoint-2", "checkpoint-3"] if whole else ["checkpoint-3"])
    # Once the uploads are through, the next save removes what they needed.
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer._finish_current_push()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_upload_leaves_out_a_checkpoint_that_is_being_written(
    hub, uploads, model, processor, tmp_path, monkeypatch
) -> None:
    trainer = pushing(model, processor, tmp_path, "every_save", max_steps=2)
    write = trainer._save_optimizer_and_scheduler

    def slowly(folder):
        write(folder)
        if trainer.state.global_step == 2:
            assert any((tmp_path / PARTIAL_DIR).rglob("model.safetensors"))
            uploads.set()
            trainer._finish_current_push()
            assert failures(trainer) == [None]

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", slowly)
    trainer.train()
    assert "model.safetensors" in hub.files
    assert not [name for name in hub.files if "checkpoint" in name]


def test_a_push_replaces_a_finished_model_with_all_that_describes_it(hub, uploads, model, processor, tmp_path) -> None:
    """A run that is trained for longer: until it is finished again, its folder does not say that it is."""
    uploads.set()
    constant = {"lr_scheduler_type": "constant", "max_steps": 1}
    trainer = pushing(model, processor, tmp_path, "every_save", **constant)
    trainer.train()
    trainer.save_model()
    assert "dualspeed.json" in hub.files
    (tmp_path / "eval.json").write_text("{}")
    again = pushing(
        build_tiny_llava(processor, seed=0), processor, tmp_path, "every_save", **{**constant, "max_steps": 2}
    )
    again.train(resume_from_checkpoint=True)
    assert find_fault(tmp_path / "checkpoint-2", thorough=True) is None
    assert not (tmp_path / "dualspeed.json").exists()
    assert not (tmp_path / "eval.json").exists()
    assert hub.files["model.safetensors"] == (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
