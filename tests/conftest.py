"""Shared fixtures: the tiny model with random weights, its processor, and batches of digit scenes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from saccade.data import digit_scenes
from saccade.dualspeed import DualSpeedCollator
from saccade.tiny import build_tiny_llava, build_tiny_processor

torch.set_num_threads(1)

# The same examples in every run, so that what passes once passes in every clone, and no time limit that a busy machine
# can miss. `make test-slow` searches at random; what it finds becomes an `@example`.
UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **UNHURRIED)
settings.register_profile("search", print_blob=True, **UNHURRIED)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def processor():
    return build_tiny_processor()


@pytest.fixture
def model(processor):
    return build_tiny_llava(processor, seed=0)


@pytest.fixture(scope="session")
def scenes():
    """64 rows of questions, text-only ones among them."""
    rows = digit_scenes("sft", "train", 64, seed=5)
    assert {len(row["images"]) for row in rows} >= {0, 1}
    return rows


@pytest.fixture(scope="session")
def collator(processor):
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    return DualSpeedCollator(processor=processor, assistant_only_loss=True, placeholder_id=image)


@pytest.fixture(scope="session")
def mixed_rows():
    """Four samples: one image, two images in two turns, text only, one image with a longer answer."""
    single = digit_scenes("sft", "train", 2, seed=1, kinds=["read"])
    text = digit_scenes("sft", "train", 1, seed=1, kinds=["text_only"])
    pair = digit_scenes("sft", "train", 2, seed=2, kinds=["count", "max"])
    both = {
        "images": [pair[0]["images"][0], pair[1]["images"][0]],
        "messages": [
            {"role": "user", "content": "<image>\nhow many digits ?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "what is the maximum ? <image>"},
            {"role": "assistant", "content": "7"},
        ],
    }
    return [single[0], both, text[0], single[1]]
