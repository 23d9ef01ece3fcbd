"""Rows with videos: from a file's record to a batch, and one clear error for each that cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_trainer
from PIL import Image
from video_files import SIZE, frame_image, write_frames
from video_models import build

from saccade.data.conversation import convert
from saccade.data.folders import ImageFolders
from saccade.data.mixture import SourceOptions, mix, stream
from saccade.data.sources import _found_video, found
from saccade.dualspeed.collator import DualSpeedCollator
from saccade.errors import RecordError, SaccadeError
from saccade.families import get_family
from saccade.videos import Sampling

ANSWER = {"role": "assistant", "content": "3"}
PART = {"type": "video"}
TEXT = {"type": "text", "text": "how many ?"}


def turns(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "3"}]


def chat(content) -> list[dict]:
    return [{"role": "user", "content": content}, ANSWER]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "data"
    write_frames(path / "clips" / "a", 6)
    write_frames(path / "clips" / "b", 4)
    frame_image(0).save(path / "one.png")
    return path


@pytest.fixture(scope="module")
def built():
    return build("qwen2_5_vl")


@pytest.fixture
def collator(built):
    model, processor = built
    placeholder = get_family(model).placeholder_id
    options = {"assistant_only_loss": True, "completion_only_loss": True}
    return DualSpeedCollator(processor=processor, placeholder_id=placeholder, **options)


RECORDS = {
    "LLaVA": {"video": "clips/a", "conversations": turns("<video>\nhow many ?")},
    "LLaVA-Video": {"video": "clips/a", "conversations": turns("<image>\nhow many ?")},
    "no tag": {"video": "clips/a", "conversations": turns("how many ?")},
    "videos": {"videos": ["clips/a"], "messages": chat("<video> how many ?")},
    "a part": {"videos": ["clips/a"], "messages": chat([PART, TEXT])},
    "a part with the video": {"messages": chat([PART | {"video": "clips/a"}, TEXT])},
    "a part with the video and a rate": {"messages": chat([PART | {"video": {"path": "clips/a", "fps": 1}}, TEXT])},
    "a list of frames": {"videos": [[f"clips/a/frame{n}.png" for n in range(6)]], "messages": chat([PART, TEXT])},
    "a table's frames": {
        "videos": [{"frames": [{"bytes": None, "path": f"clips/a/frame{n}.png"} for n in range(6)], "fps": None}],
        "messages": chat([PART | {"text": None}, TEXT | {"video": None}]),
    },
    "prompt and completion": {"videos": ["clips/a"], "prompt": chat("how many ?")[:1], "completion": [ANSWER]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_form_gives_the_same_batch(folder, collator, name):
    folders = ImageFolders([folder])
    batches = [collator([found(convert(record), folders)]) for record in (RECORDS["LLaVA"], RECORDS[name])]
    assert batches[0].keys() == batches[1].keys()
    for key, value in batches[0].items():
        assert torch.equal(torch.as_tensor(batches[1][key]), torch.as_tensor(value)), key


def test_a_batch_of_images_videos_and_text(folder, built, collator):
    model, processor = built
    folders = ImageFolders([folder])
    rows = [
        {"video": "clips/a", "image": "one.png", "conversations": turns("<image> which ? <video>")},
        {"videos": ["clips/b", "clips/a"], "messages": chat("<video> above <video>")},
        {"messages": chat("3 plus 4")},
        {"image": "one.png", "messages": chat("how many ?")},
    ]
    batch = collator([found(convert(row), folders) for row in rows])
    # Pairs of frames of 32 x 48 px: grids of 8 x 12 patches.
    assert batch["video_grid_thw"].tolist() == [[3, 8, 12], [2, 8, 12], [3, 8, 12]]
    assert batch["second_per_grid_ts"].tolist() == [2, 2, 2]
    is_video = batch["input_ids"] == model.config.video_token_id
    assert is_video.sum(dim=1).tolist() == [72, 120, 0, 0]
    is_image = batch["input_ids"] == model.config.image_token_id
    assert is_image.any(dim=1).tolist() == [True, False, False, True]
    # In the order of the tags.
    assert is_image[0].nonzero().max() < is_video[0].nonzero().min()
    learned = batch["labels"] != -100
    assert not (learned & (is_image | is_video)).any()
    assert [processor.decode(row[mask]).split() for row, mask in zip(batch["labels"], learned, strict=True)] == [
        ["3", "</s>"]
    ] * 4


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        (
            {"video": "clips/a", "conversations": turns("<video> <video> how many ?")},
            "placeholder_count",
            "2 <video> placeholder",
        ),
        ({"conversations": turns("<video> how many ?")}, "placeholder_count", "1 <video> .* but videos has 0"),
        ({"video": "clips/a", "videos": ["clips/b"], "messages": chat("a")}, "malformed", "both 'videos' and 'video'"),
        (
            {"videos": ["clips/a"], "messages": chat([PART | {"video": "clips/a"}])},
            "content_part",
            "both in 'videos' and in its messages",
        ),
        ({"messages": chat([PART | {"path": "clips/a"}, TEXT])}, "content_part", "has the field 'path'"),
        ({"video": "clips/none", "conversations": turns("a")}, "missing_video", "'clips/none' does not exist"),
        ({"video": "../secret", "conversations": turns("a")}, "outside_image_folders", "leads out of"),
        ({"video": 3, "conversations": turns("a")}, "malformed", "a video is a path"),
        ({"video": {"bytes": "AAAA"}, "conversations": turns("a")}, "malformed", "a video is a path"),
        ({"clip": "a.mp4", "conversations": turns("a")}, "field", "looks like a video"),
        (
            {"video": "clips/a", "messages": [{"role": "user", "content": "a"}, {**ANSWER, "content": "3 <video>"}]},
            "placeholder_count",
            "<video> is in an answer",
        ),
    ],
)
def test_bad_rows(folder, record, kind, message):
    write_frames(folder.parent / "secret", 2)
    with pytest.raises(RecordError, match=message) as raised:
        found(convert(record), ImageFolders([folder]))
    assert raised.value.kind == kind


def test_a_frame_that_is_a_link_out_of_the_folder_is_refused(folder):
    frame_image(0).save(folder.parent / "secret.png")
    (folder / "clips" / "a" / "frame9.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(RecordError, match=r"frame9.png' leads out of") as raised:
        found(convert(RECORDS["LLaVA"]), ImageFolders([folder]))
    assert raised.value.kind == "outside_image_folders"


def test_bad_clips_are_replaced_and_counted(folder, collator):
    path = folder / "rows.json"
    (folder / "clips" / "empty").mkdir()
    mixed = write_frames(folder / "clips" / "mixed", 2)
    Image.new("RGB", (8, 8)).save(mixed / "frame1.png")
    names = ("clips/a", "clips/empty", "clips/mixed", "clips/b")
    path.write_text(json.dumps([{"video": name, "conversations": turns("how many ?")} for name in names]))
    rows = mix([SourceOptions(str(path)).open()])
    collator.rows, collator.max_bad_records = rows, 2
    batch = collator([rows[index] for index in range(4)])
    assert [entry["kind"] for entry in batch["bad_records"]] == ["no_frames", "not_a_video"]
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 2, 2, 2]


def test_rows_of_a_stream(folder, collator):
    path = folder / "rows.jsonl"
    records = [RECORDS[name] for name in ("LLaVA", "a part with the video and a rate", "a list of frames")]
    records = [{name: record.get(name) for name in ("videos", "video", "messages")} for record in records[1:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    stored, streamed = mix([SourceOptions(str(path)).open()]), list(stream([SourceOptions(str(path))]))
    assert [row["videos"] for row in streamed] == [row["videos"] for row in stored]
    assert streamed[0]["videos"][0]["fps"] == 1
    assert collator(streamed)["video_grid_thw"].tolist() == [[3, 8, 12]] * 2


def test_which_frames_are_taken_is_an_option(folder, built, tmp_path):
    model, processor = built
    path = folder / "rows.json"
    path.write_text(json.dumps([RECORDS["LLaVA"]] * 2))
    rows = mix([SourceOptions(str(path)).open()])
    trainer = make_trainer(model, processor, tmp_path / "out", rows=rows, max_steps=1, video_frames=2)
    assert trainer.data_collator.sampling == Sampling(2)
    assert trainer.data_collator([rows[0]])["video_grid_thw"].tolist() == [[1, 8, 12]]
    with pytest.raises(SaccadeError, match="video_frames=0"):
        make_trainer(model, processor, tmp_path / "out", rows=rows, max_steps=1, video_frames=0)


def test_a_model_that_takes_no_videos_refuses_them(model, processor):
    placeholder = get_family(model).placeholder_id
    collator = DualSpeedCollator(processor=processor, assistant_only_loss=True, placeholder_id=placeholder)
    frames = [[frame_image(number) for number in range(3)]]
    with pytest.raises(RecordError, match="LlavaProcessor, makes no inputs of videos") as raised:
        collator([{"videos": frames, "messages": chat("how many ?")}])
    assert raised.value.kind == "no_video"


@pytest.mark.parametrize("positions", ["original"])
def test_fast_slow_and_teacher_steps(folder, positions, tmp_path):
    """Every mode runs on rows of videos; a fast step keeps the tokens that its budget per frame says."""
    model, processor = build("qwen2_5_vl")
    path = folder / "rows.json"
    rows = [RECORDS["LLaVA"], {"image": "one.png", "video": "clips/b", "conversations": turns("<video> or <image> ?")}]
    path.write_text(json.dumps(rows * 4))
    rows = mix([SourceOptions(str(path)).open()])
    trainer = make_trainer(
        model, processor, tmp_path / "out", rows=rows, max_steps=4, slow_probability=0.5, prune_ratio=0.75
    )
    batch = trainer.data_collator([rows[0]])
    with torch.no_grad():
        encoded = get_family(model).encode(batch)
    # Three rows of 4 x 6 tokens, one video.
    assert encoded.context.grid.tolist() == [[1, 4, 6]] * 3
    assert encoded.context.group.tolist() == [0, 0, 0]
    assert SIZE == (48, 32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss"] == entry["loss"] for entry in log)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("fps", [float("nan"), 0, "unknown"])
def test_a_rate_beside_a_file_is_not_read(tmp_path, fps):
    """As pandas fills a column: the file says how fast it is."""
    (tmp_path / "a.mp4").write_bytes(b"clip")
    folders = ImageFolders([str(tmp_path)])
    assert _found_video({"path": "a.mp4", "fps": fps}, folders) == str(tmp_path / "a.mp4")
    assert _found_video({"bytes": b"clip", "fps": fps}, folders) == {"bytes": b"clip", "path": None}
    with pytest.raises(RecordError, match="a video's 'fps' is"):
        _found_video({"frames": [], "fps": fps}, folders)
