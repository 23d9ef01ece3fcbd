"""Write docs/families.md from the results of the families' tests: which reducer works on which model family.

.venv-video/bin/python scripts/write_family_matrix.py          # runs the tests of all pairs, some minutes
python scripts/write_family_matrix.py --results r.xml          # of pytest on the test files with --junitxml r.xml
python scripts/write_family_matrix.py --results r.xml --keep   # of some of the tests; the page's other figures stay
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from saccade.reducers import list_reducers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
TESTS = ("tests/test_families.py", "tests/test_relatives.py", "tests/test_video_processors.py")
ON_CLIPS = "_with_stock_processors"
"""How the names of tests end whose figures are those of the table of videos."""

# Family: models, positions, what is special. The order of the page.
FAMILIES = {
    "llava": ("LLaVA-1.5", "1", "a row is an image"),
    "llava_next": ("LLaVA-NeXT", "1", "anyres, unpadded; a row is the thumbnail or the large image; newlines"),
    "llava_onevision": ("LLaVA-OneVision", "1", "anyres for single images; newlines; a video's row is a frame"),
    "chain_of_sight": (
        "Chain-of-Sight",
        "1",
        "a LLaVA with a multi-scale resampler; a row is a scale, those of an image are a group",
    ),
    "llava_next_video": ("LLaVA-NeXT-Video", "1", "images as in LLaVA-NeXT; a video's row is a frame"),
    "qwen2_vl": ("Qwen2-VL", "3", "dynamic resolution; a video's row is a pair of frames"),
    "qwen2_5_vl": ("Qwen2.5-VL", "3", "dynamic resolution; a video's row is a pair of frames"),
    "qwen3_vl": (
        "Qwen3-VL",
        "3",
        "dynamic resolution; deepstack features are reduced too; a video's row is a pair of frames",
    ),
    "qwen3_vl_moe": ("Qwen3-VL-MoE", "3", "as Qwen3-VL, with experts"),
    "qwen3_5": ("Qwen3.5", "3", "three of four layers are linear attention; no deepstack features"),
    "qwen3_5_moe": ("Qwen3.5-MoE", "3", "as Qwen3.5, with experts"),
    "glm4v": ("GLM-4.1V", "3", "dynamic resolution; a convolution merges the patches"),
    "glm46v": ("GLM-4.6V", "3", "as GLM-4.1V"),
    "glm4v_moe": ("GLM-4.5V", "3", "as GLM-4.1V, with experts"),
    "mistral3": ("Mistral 3", "1", "dynamic resolution, patches merged two by two; text after each line of tokens"),
    "internvl": ("InternVL", "1", "pixel shuffle; a row is a crop, the crops of an image are a group"),
    "idefics3": ("Idefics3", "1", "pixel shuffle; a row is a crop, the crops of an image are a group"),
    "smolvlm": ("SmolVLM", "1", "as Idefics3; a video's row is a frame"),
    "ovis2": ("Ovis 2", "1", "tokens are mixtures of a visual vocabulary; a row is a thumbnail or a crop"),
    "lfm2_vl": ("LFM2-VL", "1", "own aspect ratio, large images in crops; most layers are short convolutions"),
    "gemma3": ("Gemma 3", "1", "attention in both directions within an image"),
    "gemma4": ("Gemma 4", "1", "own aspect ratio; attention in both directions within an image in the larger models"),
}

# The released models with a chat template of their own: family, language model where it decides, what the stock
# template marks of the answer "12", and what is learned of it. tests/test_turns.py compares the rows with what is so.
LEARNED = (
    ("llava", "", "12 ", " 12</s>"),
    ("llava_next", "Vicuna", "12 ", " 12</s>"),
    ("llava_next", "Mistral", "", " 12</s>"),
    ("llava_onevision", "", "\n12", "12<|im_end|>"),
    ("qwen2_vl", "", "", "12<|im_end|>"),
    ("qwen2_5_vl", "", "", "12<|im_end|>"),
    ("qwen3_vl", "", "", "12<|im_end|>"),
    ("internvl", "", "", "12<|im_end|>"),
    ("idefics3", "", "", " 12<end_of_utterance>"),
    ("smolvlm", "", "", " 12<end_of_utterance>"),
    ("gemma3", "", "", "12<end_of_turn>"),
)

# What does not work or was not tested, and why.
HOLES = {
    "PaliGemma": "`forward` counts positions from 1 and `generate` from 0, so one set of pruned inputs cannot serve "
    "both; its processor takes neither text-only samples nor conversations. Not registered",
    "compact positions on Qwen-VL and GLM": "with three position axes, renumbering a shortened sequence would change "
    "what positions mean; with both values of `positions`, each token keeps its own",
    "dropped tokens of Qwen3.5 and LFM2-VL": "linear attention and convolutions know no positions: a dropped token "
    "leaves no gap in their layers, so that distances in the image are shorter there, with both values of "
    "`positions`. Layers of full attention keep the positions; with these alone, pruned equals masked, which is "
    "tested",
    "padding-free batches and Skip-Vision on Qwen3.5 and LFM2-VL": "a state of linear attention, or a convolution, "
    "would run from one packed row into the next, and skipping is defined for attention and feed-forward networks; "
    "refused in one line",
    "a loss that balances experts": "the routers of the MoE models get the gradient of the answers only, as in the "
    "stock models unless `output_router_logits` is set; `router_aux_loss_coef` is refused in one line",
    "images beside videos in a batch of GLM": "the placeholders of both are the same, and the stock models take a "
    "batch of either. Fast and slow steps and `prune_inputs` pass on both together, which is tested. Where the stock "
    "model gets the batch as it is, in stock steps and for answers on all tokens, it fails on it",
    "Skip-Vision on Mistral 3 and Pixtral": "text after each line of tokens leaves no place where all that is kept of "
    "an image stands together; refused in one line. Between crops (Idefics3, SmolVLM, Ovis 2) each crop is laid out "
    "by itself",
    "the text in images of Mistral 3 and Pixtral": "`[IMG_BREAK]` after each line of tokens is text, and is always "
    "kept",
    "LLaVA with other towers than CLIP": "`tests/test_towers.py` tests SigLIP (also SigLIP 2 of a fixed size), DINOv2 "
    "with and without registers, DINOv3, AIMv2, MLCD, I-JEPA, ViT and Pixtral towers with one reducer, not with all. "
    "A class token and registers among the features are always kept. A `siglip2_vision_model` takes patches, which "
    "LLaVA's processor does not give; refused in one line",
    "`random` on Mistral 3 and Pixtral, a batch against its samples": "the tower attends to all images of a batch in "
    "one sequence, so that the last bits of features depend on the batch; `random` draws by the bits, where training "
    "gives no seed",
    "LFM2-VL's own image processor": "needs torchvision; the tests of the tables use one that cuts images alike, and "
    "`make test-video` the stock one",
    "markers between the crops of Ovis 2 and LFM2-VL": "they are text, and are always kept. Servers refuse "
    "`budget: image` for that reason",
    "Ovis 2 whose tokens are drawn (`tokenize_function: gumbel_argmax`)": "the stock model draws them anew in each "
    "encoding. All passes of a step share one encoding, but answers differ from call to call. The default mixes them",
    "Gemma 4": "text and images work, with Skip-Vision too. Videos and sound are refused in one line, and so is "
    "Skip-Vision where layers have experts beside their feed-forward network. PEFT does not take the layers of its "
    "tower: with `target_modules` as a regular expression, such as `.*language_model.*(q_proj\\|v_proj)`, LoRA goes "
    "into the language model",
    "Gemma 3 and 4 beyond their sliding windows": "windows count tokens, not positions: in a shortened sequence a "
    "window reaches further back, and pruned no longer equals masked",
    "Gemma 3 pan-and-scan crops": "text separates them, so each counts as an image and has its own isolator",
    "`image_aspect_ratio` on all families but LLaVA": "Gemma 3's processor resizes the whole image to a square and "
    "cannot pad; the others take images at their own aspect ratio. Nothing is cropped; refused in one line",
    'LLaVA-NeXT with `vision_feature_select_strategy="full"`': "the stock model itself cannot pack the class token",
    "newlines of anyres images": "reducers never get them. They are kept and count towards the budget, with at least "
    'one token of the image besides them; `newlines="drop"`, in `prune_inputs` and in training, drops them',
    "`merge: encoder` of `visionzip` and `prumerge`, except on LLaVA, LLaVA-NeXT, InternVL and Ovis 2": "the "
    "projector does not take tokens one by one: it pools or merges patches itself, tokens are resized after it, or "
    "features enter at several layers; refused in one line",
    "SmolVLM's own processor": "needs the num2words package; the tests of images use Idefics3's, which writes the "
    "same tokens, and `make test-video` its own",
}

INTRODUCTION = """\
# Model families

This page tells you whether your model works with Saccade, and with which reducers. `prune_inputs` and
`DualSpeedTrainer` find the family by `config.model_type`; [Add a family](add-a-family.md) shows how to add one.

`scripts/write_family_matrix.py` wrote this page on {date} from the results of `tests/test_families.py`,
`tests/test_relatives.py` and `tests/test_video_processors.py`, with transformers {transformers} and torch {torch} on a
CPU. The tests use tiny models of the stock classes with random weights; no released weights were run. Most figures
are older than the page: [their dates](#which-pairs-work).

| `model_type` | models | position axes | |
|---|---|---|---|
{families}

## What is learned of an answer

In training, an answer follows the generation prompt of the model's own chat template and ends with the token at which
`generate` stops. Both are found by comparing the conversation with and without the answer, so `{{% generation %}}`
marks are not needed. If the template writes no end token, it is added, as in the released code. Inference uses the
stock template, which is also the one that is saved: in a prompt of LLaVA-1.5, earlier answers have no end token.

`tests/test_turns.py` tests this table. For each row it also tests that `messages`, `prompt` and `completion`, and
several turns teach only the answers and their end tokens, with a tokenizer like Llama's and with a byte-level one.

| `model_type` | marked by the stock template in the answer `12` | learned |
|---|---|---|
{learned}

Your own template works in the same way. Before the first step, in `saccade train --dry-run` and in `saccade data
check --model`, a conversation of two turns is rendered and its labels are compared with its answers. A template is
refused in one line if it writes something between its generation prompt and the answer, as those of thinking models
do, if it renders a turn differently once others follow, or if it ends turns with a token at which `generate` does not
stop.

## What was tested

A batch has a sample with one image, one with two images of different sizes in two turns, a text-only one, and one
with an image and a longer answer. A batch with videos has a clip, an image before a longer clip, text only, and the
longer clip alone. For each pair of a family and a reducer, at a ratio of 0.7 if not stated otherwise:

- with a ratio of 0, the output equals the stock model's bit for bit, and `generate` writes the same as on the full
  inputs;
- with original positions, the pruned sequence equals the full one with the dropped tokens masked, to 1e-4. With layers
  of linear attention or convolutions (Qwen3.5, LFM2-VL) it equals the language model on the embeddings of the kept
  tokens alone: those layers know no positions, and a masked token still ages their state;
- in each position mode, cached generation equals uncached; a batch equals its samples one by one; each of a prompt's
  sequences gets its own images; left padding equals right padding;
- gradients of a fast step reach the kept or merged tokens, projector, isolator and language model, and nothing else;
- a fast and a slow step of `DualSpeedTrainer` run, with and without LoRA; the saved model loads in the stock class
  with every key and gives the same logits.

## Which pairs work

The tables give the number of tests that passed, in bold if one failed. `-` means that there are none; the last table
has the reason. The reducer `none` has no column: it keeps everything, which is what the first test checks.
"""

EARLIER = """\
These figures are of several runs. All families but those that follow: 2026-11-21, transformers 5.23.0; of these, the
columns `changes`, `frames`, `holov`, `mmtok` and `scope`: 2026-11-29, transformers 5.24.0. The rows of
`chain_of_sight`, `qwen3_vl_moe`, `qwen3_5`, `qwen3_5_moe`, `glm4v`, `glm46v`, `glm4v_moe`, `mistral3`, `ovis2`,
`lfm2_vl` and `gemma4`: 2026-11-29, transformers 5.24.0.
"""

VIDEOS = """\
## Videos

`make test-video` trains and runs tiny models on clips with the stock processors, in an environment that has
torchvision (`tests/test_video_processors.py`): fast, slow and teacher passes, padded and packed, on rows of clips, of
clips and images, and of text; each budget; the saved model and its processor; and the invariants listed above but for
training, with `divprune` and `vispruner`. Its slow tests have the other reducers. The table gives the number of tests
of invariants that passed on clips; `-` was not run:

{matrix}

Where one failed, `random` gave a clip alone other tokens than in a batch: without a seed it draws by the exact digits
of the features, and on the processor of this run (Intel Xeon with AMX) those of Qwen3-VL's tower differ by 3e-6
between the two.

| `model_type` | a row of features, which `budget: crop` applies to | in the text |
|---|---|---|
| `llava_onevision` | a frame | the frames of a clip follow one another, then a newline |
| `llava_next_video` | a frame, pooled to a quarter of its tokens | the frames of a clip follow one another |
| `qwen2_vl`, `qwen2_5_vl` | two frames, merged by the tower | the pairs of a clip follow one another |
| `qwen3_vl`, `qwen3_vl_moe`, `qwen3_5` | two frames, merged by the tower | the time of each pair stands before it |
| `glm4v`, `glm46v` | two frames, merged by the tower | the time of each pair follows it |
| `internvl` | a frame | `Frame1:` and so on before each |
| `smolvlm` | a frame | how many frames there are and how long the clip is, then the time of each before it |

`glm4v_moe` has the code and the processor of `glm4v`, and `qwen3_5_moe` those of `qwen3_5`; these two were not run on
clips.

`budget: image` gives the frames of a clip one budget, `sample` all clips and images of a sample. InternVL and SmolVLM
count each frame as an image, also for `image`: set `sample`. SmolVLM's processor gives the frames of clips under the
name of images, in place of those of the images beside them: saccade puts both into the order of the text. Of the other
families, LLaVA, LLaVA-NeXT, Idefics3, Gemma 3, Mistral 3, LFM2-VL and Ovis 2 have no video processor, and Gemma 4's
is not supported. A row with a video is refused for all of these.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="JUnit XML of a finished run; without it the tests are run")
    parser.add_argument("--keep", action="store_true", help="keep the page's figures of pairs without results")
    arguments = parser.parse_args()
    results = arguments.results
    if results is None:
        if find_spec("torchvision") is None:
            raise SystemExit("the tests on clips need torchvision: run this with .venv-video/bin/python")
        results = Path(tempfile.mkdtemp()) / "families.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, f"--junitxml={results}"]
        subprocess.run(command, cwd=ROOT, check=False)
    kept = figures(PAGE.read_text()) if arguments.keep else {}
    PAGE.write_text(page(read(results), kept))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def read(path: Path) -> dict[tuple[str, str, bool], list[bool]]:
    """By family, reducer ("" for tests without one) and whether videos were among the inputs: what passed."""
    outcomes = defaultdict(list)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name"))
        if match is None:
            continue
        test, (family, *rest) = match[1], match[2].split("-")
        if test.endswith("_with_videos"):  # put together by hand, for where there is no torchvision
            continue
        passed = not any(child.tag in ("failure", "error", "skipped") for child in case)
        reducer = rest[0] if rest and rest[0] in list_reducers() else ""
        outcomes[family, reducer, test.endswith(ON_CLIPS)].append(passed)
    return outcomes


def figures(text: str) -> dict[tuple[str, str, bool], str]:
    """The figures of a page's tables, by family, reducer and whether videos were among the inputs."""
    found: dict[tuple[str, str, bool], str] = {}
    head: list[str] = []
    tables = 0
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| | ") and set(cells[1:]) <= set(list_reducers()):
            head, tables = cells[1:], tables + 1
        elif not line.startswith("|"):
            head = []
        elif head and cells[0].startswith("`"):
            found |= {
                (cells[0].strip("`"), name, tables > 1): cell for name, cell in zip(head, cells[1:], strict=True)
            }
    return found


def page(outcomes: dict[tuple[str, str, bool], list[bool]], kept: dict[tuple[str, str, bool], str]) -> str:
    """The whole page; of pairs that have no outcome, the figures that are kept."""
    shown = kept | {pair: cell(passed) for pair, passed in outcomes.items() if pair[1]}
    reducers = sorted({reducer for _, reducer, _ in shown})
    missing = set(FAMILIES) ^ {family for family, _, _ in shown}
    if missing:
        raise SystemExit(f"{', '.join(sorted(missing))}: in the tests or on this page only; complete FAMILIES")
    families = (f"| `{name}` | {models} | {axes} | {note} |" for name, (models, axes, note) in FAMILIES.items())
    versions = {name: version(name) for name in ("transformers", "torch")} | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
    lines = [INTRODUCTION.format(families="\n".join(families), learned="\n".join(learned_rows()), **versions)]
    lines += matrix(shown, reducers, videos=False)
    lines += [
        "",
        *([EARLIER] if kept else []),
        VIDEOS.format(matrix="\n".join(matrix(shown, reducers, videos=True)))
        + "## What does not work or was not tested",
        "",
        "| what | why |",
        "|---|---|",
    ]
    lines += [f"| {what} | {why} |" for what, why in HOLES.items()]
    return "\n".join(lines) + "\n"


def learned_rows() -> list[str]:
    """Rows of the table of what is learned."""
    rows = []
    for family, model, *texts in LEARNED:
        marked, learned = (f"`{json.dumps(text)}`".replace("|", r"\|") if text else "nothing" for text in texts)
        rows.append(f"| `{family}`{model and f' with {model}'} | {marked} | {learned} |")
    return rows


def matrix(shown: dict[tuple[str, str, bool], str], reducers: list[str], videos: bool) -> list[str]:
    """Rows of a table, a line each."""
    rows = [f"| | {' | '.join(reducers)} |", "|---" * (len(reducers) + 1) + "|"]
    for family in FAMILIES:
        cells = [shown.get((family, reducer, videos), "-") for reducer in reducers]
        if set(cells) != {"-"}:
            rows.append(f"| `{family}` | {' | '.join(cells)} |")
    return rows


def cell(passed: list[bool]) -> str:
    """A pair's entry in the table."""
    return f"{sum(passed)}" if all(passed) else f"**{sum(passed)} of {len(passed)}**"


if __name__ == "__main__":
    main()
