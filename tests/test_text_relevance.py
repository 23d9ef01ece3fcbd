"""Relevance of visual tokens to the user's words: whose words they are, and the two ways to compute it."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.integrations.neftune import activate_neftune

from saccade import prune_inputs
from saccade.errors import SaccadeError
from saccade.families import get_family
from saccade.families.text_relevance import load_text_tower, row_samples, special_ids, user_words
from saccade.reducers import Needs, PruningConfig, get_reducer
from saccade.testing.training import fast_slow_step
from saccade.tiny import build_tiny_llava, build_tiny_processor

RELEVANCE = Needs(frozenset({"relevance"}))
IGNORED = -100
ASKED = (["read all digits ."], ["how many digits ?", "what is the maximum ?"], [], ["read all digits ."])
"""The user's words in the mixed rows, without those of the template; the third has no image."""


@pytest.fixture
def batch(collator, mixed_rows):
    return dict(collator([dict(row) for row in mixed_rows]))


def words_of(model, batch, row: int, labels: torch.Tensor | None) -> list[list[int]]:
    """The word ids of each turn of a sample, from a walk over its tokens."""
    special = {0, 1, 2, 4}
    turns: list[list[int]] = [[]]
    answered = False
    ids = batch["input_ids"][row].tolist()
    for place, token in enumerate(ids):
        answer = labels is not None and int(labels[row, place]) != IGNORED
        if answer and not answered:
            turns.append([])
        answered = answer
        if batch["attention_mask"][row, place] and not answer and token not in special:
            turns[-1].append(token)
    if labels is not None and len(turns) > 1:
        turns.pop()  # what follows the last answer
    return [turn for turn in turns if turn]


def relevance_oracle(model, family, encoded, batch, labels) -> torch.Tensor:
    embed = model.get_input_embeddings().weight
    owner = [row for row, ids in enumerate(batch["input_ids"].tolist()) for token in ids if token == 4]
    expected = torch.zeros(encoded.context.shape[:2])
    for number, features in enumerate(encoded.context.features):
        turns = words_of(model, batch, owner[number * features.shape[0]], labels)
        for token, feature in enumerate(features):
            cosines = [
                torch.stack([torch.cosine_similarity(feature, embed[word], dim=0) for word in turn]).mean()
                for turn in turns
            ]
            expected[number, token] = torch.stack(cosines).mean()
    return expected


@torch.no_grad()
def test_relevance_is_the_mean_cosine_over_words_then_turns(model, batch):
    family = get_family(model)
    assert special_ids(model.config) == [0, 1, 2, 4]
    assert len(words_of(model, batch, 1, batch["labels"])) == 2  # the sample with two questions
    for labels in (batch["labels"], None):
        encoded = family.encode(batch, RELEVANCE, labels=labels)
        expected = relevance_oracle(model, family, encoded, batch, labels)
        torch.testing.assert_close(encoded.context.relevance, expected)
    assert row_samples(encoded.context, batch["input_ids"] == 4).tolist() == [0, 1, 1, 3]


@torch.no_grad()
@pytest.mark.parametrize("field", ["relevance", "word_relevance"])
def test_the_question_is_read_without_the_noise_of_training(model, batch, field):
    """What `neftune_noise_alpha` adds to the embeddings of a batch of rows."""
    family, needs = get_family(model.train()), Needs(frozenset({field}))
    before = family.encode(batch, needs).context
    activate_neftune(model, 5.0)
    noisy = family.encode(batch, needs).context
    assert torch.equal(getattr(noisy, field), getattr(before, field))
    assert model.get_input_embeddings().training


@torch.no_grad()
def test_answers_have_no_say(model, batch):
    family = get_family(model)
    labels = batch["labels"]
    before = family.encode(batch, RELEVANCE, labels=labels).context.relevance
    changed = {**batch, "input_ids": torch.where(labels != IGNORED, 20, batch["input_ids"])}
    assert torch.equal(family.encode(changed, RELEVANCE, labels=labels).context.relevance, before)
    # The question has one, and without labels so would the answer.
    question = int(batch["input_ids"][0][batch["input_ids"][0] > 60][0])
    asked = {**batch, "input_ids": torch.where(batch["input_ids"] == question, 20, batch["input_ids"])}
    assert not torch.equal(family.encode(asked, RELEVANCE, labels=labels).context.relevance, before)
    assert not torch.equal(
        family.encode(changed, RELEVANCE).context.relevance, family.encode(batch, RELEVANCE).context.relevance
    )


class TestWordByWord:
    """What `mmtok` needs: relevance to each word, with as many words as the row's sample has."""

    NEEDS = Needs(frozenset({"word_relevance"}))

    @torch.no_grad()
    def test_the_cosine_with_each_word_of_all_turns(self, model, batch):
        family, embed = get_family(model), model.get_input_embeddings().weight
        for labels in (batch["labels"], None):
            context = family.encode(batch, self.NEEDS, labels=labels).context
            for number, row in enumerate((0, 1, 1, 3)):
                words = [word for turn in words_of(model, batch, row, labels) for word in turn]
                expected = torch.cosine_similarity(context.features[number].unsqueeze(1), embed[words], dim=2)
                assert int(context.words[number]) == len(words)
                torch.testing.assert_close(context.word_relevance[number, :, : len(words)], expected)
                assert not context.word_relevance[number, :, len(words) :].any()

    @torch.no_grad()
    def test_answers_have_no_say(self, model, batch):
        family, labels = get_family(model), batch["labels"]
        before = family.encode(batch, self.NEEDS, labels=labels).context
        changed = {**batch, "input_ids": torch.where(labels != IGNORED, 20, batch["input_ids"])}
        after = family.encode(changed, self.NEEDS, labels=labels).context
        assert torch.equal(after.word_relevance, before.word_relevance)
        assert torch.equal(after.words, before.words)
        assert not torch.equal(
            family.encode(changed, self.NEEDS).context.word_relevance,
            family.encode(batch, self.NEEDS).context.word_relevance,
        )

    @torch.no_grad()
    def test_the_bare_question_with_a_tokenizer(self, model, batch, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        reducer = get_reducer("mmtok", tokenizer=str(tmp_path))
        context = get_family(model).encode(batch, Needs.of(reducer, PruningConfig()), labels=batch["labels"]).context
        asked = [processor.tokenizer.encode(" ".join(ASKED[row]), add_special_tokens=False) for row in (0, 1, 1, 3)]
        assert context.words.tolist() == [len(words) for words in asked]
        expected = torch.cosine_similarity(
            context.features[1].unsqueeze(1), model.get_input_embeddings().weight[asked[1]], dim=2
        )
        torch.testing.assert_close(context.word_relevance[1, :, : len(asked[1])], expected)

    @torch.no_grad()
    def test_without_words_the_image_alone_is_covered(self, model, processor):
        image = torch.randint(0, 255, (96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        inputs = processor(images=[image.numpy()], text="<image>", return_tensors="pt")
        reducer = get_reducer("mmtok")
        context = get_family(model).encode(inputs, Needs.of(reducer, PruningConfig())).context
        assert context.words.tolist() == [0]
        empty = context.replace(word_relevance=context.word_relevance[:, :, :0], words=None)
        assert torch.equal(reducer(context, 9).index, reducer(empty, 9).index)

    def test_the_question_decides_what_stays(self, model, processor, scenes):
        row = next(row for row in scenes if len(row["images"]) == 1)
        kept = []
        for words in ("how many digits is there ?", "read the first digit"):
            inputs = processor(images=row["images"], text=f"<image> {words}", return_tensors="pt")
            context = get_family(model).encode(inputs, Needs.of(get_reducer("mmtok"), PruningConfig())).context
            kept.append(get_reducer("mmtok")(context, 9).index)
            pruned = prune_inputs(model, inputs, reducer="mmtok", keep_tokens=9)
            assert inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1] == context.shape[1] - 9
        assert not torch.equal(*kept)


def test_turns():
    ids = torch.arange(12).unsqueeze(0)
    labels = torch.tensor([[-100, -100, -100, 7, 7, -100, -100, 7, -100, -100, -100, -100]])
    mask = torch.tensor([[1] * 11 + [0]])
    special = torch.zeros(1, 12, dtype=torch.bool)
    special[0, 0] = True
    words, turn = user_words(ids, mask, labels, special)
    assert words[0].nonzero().flatten().tolist() == [1, 2, 5, 6]
    assert turn[0, words[0]].tolist() == [0, 0, 1, 1]
    everything, one = user_words(ids, mask, None, special)
    assert everything[0].nonzero().flatten().tolist() == list(range(1, 11))
    assert not one.any()
    unanswered, _ = user_words(ids, mask, torch.full_like(labels, -100), special)
    assert torch.equal(unanswered, everything)
    answers_only, _ = user_words(ids, mask, ids, special)
    assert not answers_only.any()


@torch.no_grad()
def test_no_words_is_dpp(model, processor):
    image = torch.zeros(96, 96, 3, dtype=torch.uint8)
    image[20:50, 30:70] = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator())
    inputs = processor(images=[image.numpy()], text="<image>", return_tensors="pt")
    context = get_family(model).encode(inputs, RELEVANCE).context
    assert (context.relevance == 0).all()
    assert torch.equal(get_reducer("cdpruner")(context, 14).index, get_reducer("dpp")(context, 14).index)


@torch.no_grad()
def test_padding_side_and_batch_mates_do_not_matter(model, processor, scenes):
    rows = [row for row in scenes if len(row["images"]) == 1][:3]
    texts = ["<image> " + row["messages"][0]["content"].replace("<image>", "") for row in rows]
    texts[1] += " how many digits is there ?"
    images = [row["images"][0] for row in rows]
    family = get_family(model)
    together = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    relevance = family.encode(together, RELEVANCE).context.relevance
    for number in range(3):
        alone = processor(images=[images[number]], text=[texts[number]], return_tensors="pt")
        torch.testing.assert_close(family.encode(alone, RELEVANCE).context.relevance[0], relevance[number])


class TestBareQuestions:
    """With a tokenizer the user's words count, and not the template's nor, in inference, an earlier answer's."""

    @pytest.fixture
    def asked(self, processor, tmp_path):
        processor.save_pretrained(tmp_path / "processor")
        return Needs(RELEVANCE.fields, tokenizer=str(tmp_path / "processor"))

    @torch.no_grad()
    def test_the_mean_cosine_over_words_then_turns(self, model, batch, processor, asked):
        family, embed = get_family(model), model.get_input_embeddings().weight
        encoded = family.encode(batch, asked, labels=batch["labels"])
        for number, row in enumerate((0, 1, 1, 3)):
            turns = [processor.tokenizer.encode(words, add_special_tokens=False) for words in ASKED[row]]
            for token, feature in enumerate(encoded.context.features[number]):
                cosines = [
                    torch.stack([torch.cosine_similarity(feature, embed[word], dim=0) for word in turn]).mean()
                    for turn in turns
                ]
                expected = torch.stack(cosines).mean()
                torch.testing.assert_close(encoded.context.relevance[number, token], expected)

    @torch.no_grad()
    def test_nothing_else_has_a_say(self, model, processor, asked, scenes):
        family = get_family(model)
        row = next(row for row in scenes if len(row["images"]) == 1)
        question, answer = "how many digits is there ?", [{"role": "assistant", "content": "3"}]
        found = {}
        for name, words, after in (
            ("bare", question, []),
            ("answered", question, answer),
            ("other", "read the first digit", []),
        ):
            parts = [{"type": "image"}, {"type": "text", "text": words}]
            talk = [{"role": "user", "content": parts}, *after]
            prompt = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=not after)
            inputs = processor(images=row["images"], text=prompt, return_tensors="pt")
            found[name] = family.encode(inputs, asked).context.relevance
        without = processor(images=row["images"], text=f"<image> {question}", return_tensors="pt")
        torch.testing.assert_close(family.encode(without, asked).context.relevance, found["bare"])
        torch.testing.assert_close(found["answered"], found["bare"])
        assert not torch.allclose(found["other"], found["bare"], atol=1e-4)

    def test_the_models_own_folder_or_the_option_gives_the_tokenizer(self, model, batch, processor, asked, tmp_path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        expected = get_family(model).encode(batch, asked, labels=batch["labels"])
        for model_asked, options in ((loaded, {}), (model, {"tokenizer": str(tmp_path)})):
            reducer = get_reducer("cdpruner", **options)
            found = get_family(model_asked).encode(batch, Needs.of(reducer, PruningConfig()), labels=batch["labels"])
            torch.testing.assert_close(found.context.relevance, expected.context.relevance)
        plain = get_family(model).encode(batch, RELEVANCE, labels=batch["labels"])
        assert not torch.allclose(plain.context.relevance, expected.context.relevance, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model as wide as the tiny tower, with a text tower that reads ten tokens, and a tokenizer."""
    processor = build_tiny_processor()
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return str(folder)


class TestTextTower:
    @torch.no_grad()
    def test_minus_the_mean_cosine_over_segments_then_turns(self, model, batch, folder, processor):
        reducer = get_reducer("cdpruner", text_tower=folder, tokenizer=folder)
        encoded = get_family(model).encode(batch, Needs.of(reducer, PruningConfig()), labels=batch["labels"])
        clip = CLIPModel.from_pretrained(folder).eval()
        patches = clip.visual_projection(
            clip.vision_model.post_layernorm(
                model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
            )
        )
        for number, row in enumerate((0, 1, 1, 3)):
            total = torch.zeros(patches.shape[1])
            turns = [processor.tokenizer.encode(words, add_special_tokens=False) for words in ASKED[row]]
            for turn in turns:
                segments = [turn[at : at + 8] for at in range(0, len(turn), 8)]
                for segment in segments:
                    ids = torch.tensor([[1, *segment, 2]])
                    vector = clip.text_projection(clip.text_model(ids).pooler_output)
                    total -= torch.cosine_similarity(patches[number], vector, dim=1) / len(segments) / len(turns)
            torch.testing.assert_close(encoded.context.relevance[number], total)

    def test_long_questions_are_cut_into_segments(self, folder):
        tower = load_text_tower(folder, folder)
        once, twice = "how many digits", "how many digits is there ? " * 3
        assert tower._embed(twice, torch.device("cpu")).shape == (12,)
        torch.testing.assert_close(tower._embed(once, torch.device("cpu")).norm(), torch.tensor(1.0))
        assert tower._embed(twice, torch.device("cpu")).norm() < 1

    def test_in_training_and_inference(self, model, batch, folder):
        options = {"text_tower": folder, "tokenizer": folder}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        pruned = prune_inputs(model, inputs, reducer="cdpruner", reducer_options=options)
        assert pruned["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        step = fast_slow_step(model, get_reducer("cdpruner", **options))
        step("fast", batch, 10.0).loss.backward()
        assert not any(p.requires_grad for p in load_text_tower(folder, folder).model.parameters())

    def test_what_does_not_fit_is_one_line(self, model, batch, folder, processor, tmp_path):
        family = get_family(model)
        for options, message in (
            ({"text_tower": str(tmp_path), "tokenizer": folder}, "text_tower=.*no CLIPModel"),
            ({"text_tower": folder, "tokenizer": str(tmp_path)}, "tokenizer=.*no tokenizer"),
            ({"text_tower": folder}, "option 'tokenizer'"),
        ):
            with pytest.raises(SaccadeError, match=message):
                family.encode(batch, Needs.of(get_reducer("cdpruner", **options), PruningConfig()))
        narrow = build_tiny_llava(processor)
        narrow.config.vision_feature_layer = [-2, -1]
        projector = narrow.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(2 * 96, projector.linear_1.out_features)
        with pytest.raises(SaccadeError, match="width 96, but the model's vision tower gives features of width 192"):
            get_family(narrow).encode(
                batch, Needs.of(get_reducer("cdpruner", text_tower=folder, tokenizer=folder), PruningConfig())
            )
