"""Chat templates come with models: whatever one raises is one line, wherever it is rendered."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image

from saccade import SaccadeError
from saccade.cli.main import main
from saccade.data.chat import apply_chat_template
from saccade.data.lengths import TokenCounter
from saccade.data.plain import PlainWriter
from saccade.data.turns import TurnWriter
from saccade.dualspeed import DualSpeedCollator
from saccade.dualspeed.engines import DummyImageCollator
from saccade.dualspeed.labels import check_turns
from saccade.errors import RecordError
from saccade.evaluation.digits import prepare_prompts
from saccade.reducers import PruningConfig
from saccade.report.view import process_image
from saccade.tiny import build_tiny_llava, save_tiny
from saccade.training.chat_format import make_template

SOURCES = Path(__file__).parent.parent / "src" / "saccade"
BROKEN = {
    "syntax": ("{{ messages[ }}", "unexpected"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
    "refusal": ("{{ raise_exception('such words') }}", "such words"),
    "arithmetic": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "type": ("{{ messages + 'a' }}", "TypeError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", "unsafe"),
}
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]}]
ROW = {"messages": [*ASKED, {"role": "assistant", "content": "2"}], "images": [Image.new("RGB", (96, 96))]}


def renderers(processor):
    """Everything that renders a conversation."""
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    collator = DualSpeedCollator(processor=processor, assistant_only_loss=True, placeholder_id=token)
    shown = [{**ASKED[0], "content": [{"type": "image", "image": ROW["images"][0]}]}]
    yield lambda: apply_chat_template(processor, ASKED, tokenize=False)
    yield lambda: TurnWriter(processor).write(ROW)
    yield lambda: PlainWriter(processor).write(ROW)
    yield lambda: collator([ROW])
    yield lambda: check_turns(collator)
    yield lambda: TokenCounter(processor, token, PruningConfig())
    yield lambda: DummyImageCollator(collator, token, processor)._sample([{"prompt": "a", "completion": "b"}])
    yield lambda: prepare_prompts(processor, [shown])
    yield lambda: process_image(processor, ROW["images"][0], "how many")


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_template_raises_is_one_line(processor, kind, tmp_path):
    template, message = BROKEN[kind]
    broken = deepcopy(processor)
    broken.chat_template = template
    for render in renderers(broken):
        with pytest.raises(SaccadeError, match=message) as error:
            render()
        assert "\n" not in str(error.value)
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for given in ("own", str(file)):
        broken.tokenizer.chat_template = template
        with pytest.raises(SaccadeError, match=message):
            make_template(broken.tokenizer, given, "<image>", None)


def test_a_processor_without_a_template():
    with pytest.raises(RecordError, match="the processor has no chat template"):
        apply_chat_template(object(), ASKED)


def test_templates_are_rendered_in_one_place():
    """But for the reader of questions, which looks at what a template writes and does without where it writes none."""
    calls = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        if re.search(r"\.apply_chat_template\(", path.read_text(encoding="utf-8"))
    }
    assert calls == {"data/chat.py", "families/question.py"}


def test_commands_end_in_one_line(processor, tmp_path, capfd):
    folder = tmp_path / "model"
    save_tiny(build_tiny_llava(processor, seed=0), processor, folder)
    (folder / "chat_template.jinja").write_text(BROKEN["arithmetic"][0])
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    for words in (
        ["view", str(tmp_path / "a.png"), "--model", str(folder), "--output", str(tmp_path / "view.png")],
        ["eval", str(folder), "--num-samples", "1"],
        ["train", "tiny-digits/sft", "--model", str(folder), "--output_dir", str(tmp_path / "run")],
    ):
        capfd.readouterr()
        assert main(words) == 2, words
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("saccade: error: ")
        assert "ZeroDivisionError" in line
