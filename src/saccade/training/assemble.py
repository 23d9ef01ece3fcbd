"""Assemble a LLaVA from a separately trained vision tower and language model, the starting point of both papers."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  transformers needs it for the meta device: told before anything is made
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipVisionModel,
)
from transformers.utils import logging

from saccade.errors import SaccadeError, kind_of, needs_package
from saccade.families import family_class, use_released_names
from saccade.families.chain_of_sight import SCALES, ChainOfSightConfig
from saccade.families.padding import HdPadImageProcessor
from saccade.files import check_new_folder, reading
from saccade.model_files import check_files
from saccade.tiny import tiny_checkpoint
from saccade.training.assemble_options import AssembleOptions
from saccade.training.chat_format import make_template
from saccade.training.export import check_shard_size, own_classes, whole_folder
from saccade.values import CROPS, DTYPES, PROJECTORS, check_choice

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
PADDED = 64
"""Embeddings that must grow get a multiple of so many rows."""
TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
CROP_GRIDS = {"none": (), "anyres": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), "hd": ((2, 2),), "hd_pad": ((2, 2),)}
"""For each kind of crops, the sizes that an image may be resized to, in crops (down, across)."""


def assemble_model(
    vision_tower: str | Path, language_model: str | Path, output: str | Path, options: AssembleOptions | None = None
) -> dict[str, Any]:
    """Write a LLaVA: a trained tower, a trained language model, and a new projector between them.

    The projector has torch's default initialisation. All but Chain-of-Sight's resampler is stock. The tokenizer gets
    an image token; new embedding rows are the mean of the others, and tied embeddings stay tied. Only one copy of the
    weights is in memory. The folder appears under its name only once it is complete.

    Args:
        vision_tower: folder or hub id of a CLIP or SigLIP model or vision tower, or of a LLaVA with such a tower;
            "tiny" for the tower of the embedded model.
        language_model: folder or hub id of a Llama, Mistral, Qwen2 or Qwen3 causal language model, or of a LLaVA with
            such a model; "tiny" for that of the embedded model.
        output: folder to create; it must not exist, or be empty.
        options: see `AssembleOptions`.

    Returns:
        `output`, `architecture`, `parameters`, `projector_parameters`, `visual_tokens` (of one picture or crop),
        `vocabulary`, `image_token_id`, `chat_template` ("own", "v1", or the file), `eos_token_ids`, `dtype`,
        `own_classes` (those that transformers does not have).

    Raises:
        SaccadeError: if a part is of another kind or does not fit; raised before weights are read.
        OSError: if the folder cannot be written; nothing is left behind.
    """
    options, output = options or AssembleOptions(), Path(output)
    check_choice("crops", options.crops, CROPS)
    check_choice("projector", options.projector, PROJECTORS)
    check_choice("dtype", options.dtype, DTYPES)
    check_shard_size(options.max_shard_size)
    check_new_folder(output, "output")
    vision_tower, language_model = (
        str(tiny_checkpoint() if str(part) == "tiny" else part) for part in (vision_tower, language_model)
    )
    eyes = _Tower.find(vision_tower, options)
    config = _check_language_model(language_model, options.gguf_file)
    tokenizer = _tokenizer(language_model, options.gguf_file)
    template = make_template(tokenizer, options.chat_template, IMAGE_TOKEN, options.system_prompt)
    with _quiet(), torch.random.fork_rng(devices=[]):
        language = _language_model(language_model, config, options)
        tower = eyes.load(language.dtype)
        _grow_embeddings(language, len(tokenizer))
        model = _join(language, tower, eyes, tokenizer, options)
    model.generation_config = _generation_config(language, tokenizer, template.end_id)
    beyond = getattr(model.config, "tokens_beyond_patches", 0)
    processor = eyes.processor(tokenizer, template.text, options, beyond)
    save_checked(model, processor, output, options.max_shard_size)
    return {
        "output": str(output),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "projector_parameters": sum(p.numel() for p in model.model.multi_modal_projector.parameters()),
        "visual_tokens": model.config.image_seq_length,
        "vocabulary": language.config.vocab_size,
        "image_token_id": model.config.image_token_id,
        "chat_template": template.source,
        "eos_token_ids": model.generation_config.eos_token_id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "own_classes": own_classes(model, processor),
    }


@dataclass(frozen=True)
class _Tower:
    """A vision tower: its location, its configuration, and its image processor."""

    place: str
    config: PreTrainedConfig
    images: Any
    from_llava: bool
    own_size: int | None = None
    """Edge of the pictures that it was trained on, if others are wanted."""

    @classmethod
    def find(cls, place: str, options: AssembleOptions) -> "_Tower":
        """Find a tower without reading its weights."""
        whole = _config(place, "vision_tower")
        config = getattr(whole, "vision_config", whole)
        if getattr(config, "model_type", None) not in TOWERS:
            raise SaccadeError(
                f"vision_tower={place!r} has model_type={whole.model_type!r}, which is not a CLIP or SigLIP vision "
                "tower: name a CLIP or SigLIP model, or a LLaVA that has one"
            )
        with reading(f"vision_tower={place!r} has no image processor that loads (preprocessor_config.json)"):
            images = AutoImageProcessor.from_pretrained(place)
        found = cls(place, config, images, from_llava=whole.model_type not in ("clip", "siglip", config.model_type))
        found._check(options)
        if options.image_size is not None:
            found = found._resized(options.image_size)
            found._check(options)
        return found

    def _resized(self, size: int) -> "_Tower":
        """The same for smaller pictures.

        Raises:
            SaccadeError: if they are larger than the tower's own, or not whole patches.
        """
        own, patch = self.config.image_size, self.config.patch_size
        if not 0 < size <= own or size % patch:
            raise SaccadeError(
                f"image_size={size}: the tower takes {own} x {own} pixels in patches of {patch}; give a multiple of "
                f"{patch} up to {own}"
            )
        square, cuts = {"height": size, "width": size}, bool(getattr(self.images, "do_center_crop", False))
        sizes = {"size": {"shortest_edge": size} if cuts else square}
        if getattr(self.images, "crop_size", None) is not None:
            sizes["crop_size"] = square
        images = type(self.images).from_dict({**self.images.to_dict(), **sizes})
        config = deepcopy(self.config)
        config.image_size = size
        return replace(self, config=config, images=images, own_size=own)

    def _check(self, options: AssembleOptions) -> None:
        size, patch, layers = self.config.image_size, self.config.patch_size, self.config.num_hidden_layers
        if not 0 < patch <= size:
            raise SaccadeError(
                f"vision_tower={self.place!r}: image_size={size} does not fit a patch of patch_size={patch}: fix its "
                "config.json"
            )
        given = _picture_size(self.images)
        if given != (size, size):
            raise SaccadeError(
                f"vision_tower={self.place!r}: its image processor gives pictures of {given[0]} x {given[1]} pixels, "
                f"but the tower takes {size} x {size}: fix its preprocessor_config.json"
            )
        if not -layers <= options.feature_layer <= layers:
            raise SaccadeError(
                f"feature_layer={options.feature_layer}: the tower has {layers} layers, give -{layers} to {layers}"
            )
        if options.crops != "none" and not self.class_token:
            raise SaccadeError(
                f"crops={options.crops!r} with a {self.config.model_type}: LLaVA-NeXT is only known with CLIP towers "
                "here; leave it at 'none'"
            )
        if options.projector == "resampler":
            windows = SCALES[-1][0]
            if options.crops != "none":
                raise SaccadeError(f"projector='resampler' takes whole pictures, not crops={options.crops!r}")
            if self.side % windows:
                raise SaccadeError(
                    f"projector='resampler' cuts a picture into {windows} x {windows} windows, which do not divide "
                    f"the {self.side} x {self.side} patches of vision_tower={self.place!r}"
                )

    @property
    def class_token(self) -> bool:
        return self.config.model_type == "clip_vision_model"

    @property
    def strategy(self) -> str:
        """Which of the tower's tokens the projector reads, in LLaVA's terms: all but the class token, or all."""
        return "default" if self.class_token else "full"

    @property
    def side(self) -> int:
        """Patches along an edge."""
        return self.config.image_size // self.config.patch_size

    def pinpoints(self, crops: str) -> list[list[int]]:
        return [[down * self.config.image_size, across * self.config.image_size] for down, across in CROP_GRIDS[crops]]

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The tower with its weights, without SigLIP's pooling head."""
        if not self.class_token:
            self.config.vision_use_head = False
        if self.from_llava:
            whole, info = AutoModelForImageTextToText.from_pretrained(
                self.place, dtype=dtype, output_loading_info=True
            )
            tower = whole.model.vision_tower
            # The rest of that model is not used.
            info = {kind: [key for key in keys if "vision_tower" in str(key)] for kind, keys in info.items()}
        else:
            config = deepcopy(self.config)
            config.image_size = self.own_size or config.image_size
            tower, info = TOWERS[self.config.model_type].from_pretrained(
                self.place, config=config, dtype=dtype, output_loading_info=True
            )
        _check_whole(self.place, "vision_tower", info)
        if self.own_size is None:
            return tower
        weights = tower.state_dict()
        (name,) = (name for name in weights if name.endswith("position_embedding.weight"))
        weights[name] = middle_positions(weights[name], self.side)
        smaller = type(tower)(self.config).to(dtype)
        smaller.load_state_dict(weights)
        return smaller

    def processor(
        self, tokenizer: PreTrainedTokenizerBase, template: str, options: AssembleOptions, beyond: int
    ) -> ProcessorMixin:
        """The processor of the assembled model, which has so many more visual tokens than patches."""
        kind, images = LlavaProcessor, self.images
        if options.projector == "resampler":
            resize_plainly(images, self.config.image_size)
        if options.crops != "none":
            kind, size = LlavaNextProcessor, self.config.image_size
            images = (HdPadImageProcessor if options.crops == "hd_pad" else LlavaNextImageProcessorPil)(
                size={"shortest_edge": size},
                crop_size={"height": size, "width": size},
                image_mean=self.images.image_mean,
                image_std=self.images.image_std,
                resample=self.images.resample,
                image_grid_pinpoints=self.pinpoints(options.crops),
            )
        return kind(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=self.config.patch_size,
            vision_feature_select_strategy=self.strategy,
            num_additional_image_tokens=int(self.class_token) + beyond,
            image_token=IMAGE_TOKEN,
            chat_template=template,
        )


def _config(place: str, field: str, **options: Any) -> PreTrainedConfig:
    check_files(place, field)
    where = "cannot be loaded" if Path(place).is_dir() else "is not a folder, and cannot be loaded from the hub"
    with reading(f"{field}={place!r} {where}"):
        return AutoConfig.from_pretrained(place, **options)


def _check_language_model(place: str, gguf_file: str | None) -> PreTrainedConfig:
    """The language model's configuration, which is a part of a LLaVA's."""
    if gguf_file is not None:
        _check_gguf(place, gguf_file)
    config = _config(place, "language_model", **_gguf(gguf_file))
    if config.model_type == "llava":
        config = config.text_config
    if config.model_type not in LANGUAGE_MODELS:
        encodes = "is an encoder-decoder and " if getattr(config, "is_encoder_decoder", False) else ""
        raise SaccadeError(
            f"language_model={place!r} {encodes}has model_type={config.model_type!r}: name a causal language model "
            f"that is one of {', '.join(LANGUAGE_MODELS)}"
        )
    return config


def _check_gguf(place: str, gguf_file: str) -> None:
    if Path(place).is_dir() and not (Path(place) / gguf_file).is_file():
        raise SaccadeError(f"gguf_file={gguf_file!r} is not in {place!r}: give the name of a file in that folder")
    if find_spec("gguf") is None:
        raise needs_package(f"gguf_file={gguf_file!r}", "gguf")


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _tokenizer(place: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with an image token, and a padding token if it had none."""
    with reading(f"language_model={place!r} has no tokenizer that loads"):
        tokenizer = AutoTokenizer.from_pretrained(place, **_gguf(gguf_file))
    if not tokenizer.is_fast:
        raise SaccadeError(
            f"language_model={place!r} has {kind_of(tokenizer)}, which cannot locate answers: it "
            "needs a tokenizer.json"
        )
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "left"
    return tokenizer


def _language_model(place: str, config: PreTrainedConfig, options: AssembleOptions) -> PreTrainedModel:
    loading = {"dtype": options.dtype, "output_loading_info": True, **_gguf(options.gguf_file)}
    if options.gguf_file is None:  # the names in a LLaVA, as released and as its modules are called
        loading |= {"config": config, "key_mapping": {r"^language_model\.": "", r"^model\.language_model\.": "model."}}
    with reading(f"language_model={place!r} cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(place, **loading)
    _check_whole(place, "language_model", info)
    # GGUF weights are dequantized on loading, but the config still says quantized, which the trainer would refuse.
    if hasattr(model.config, "quantization_config"):
        if options.gguf_file is None:
            raise SaccadeError(f"language_model={place!r} is quantized: name the model in full precision")
        del model.config.quantization_config
    return model


def _check_whole(place: str, field: str, info: dict[str, Any]) -> None:
    """Stock loading only warns about missing weights and initialises them randomly; here they are an error."""
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise SaccadeError(
            f"{field}={place!r}: its weights are incomplete, {missing[:3]} is missing or has another shape"
        )


def _grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embeddings to fit every token. If they already have more rows than tokens, they stay as they are."""
    before = model.get_input_embeddings().weight.shape[0]
    if tokens <= before:
        return
    model.resize_token_embeddings(tokens, pad_to_multiple_of=PADDED, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[:before].mean(dim=0, dtype=torch.float32).to(layer.weight.dtype)


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: int) -> GenerationConfig:
    """Generation settings with the end tokens of the template and the language model only; all else is dropped."""
    before = model.generation_config
    ids = [end]
    for value in (None if before is None else before.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ids += value if isinstance(value, list) else [value]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(number for number in ids if number is not None)),
        pad_token_id=tokenizer.pad_token_id,
    )


def _join(
    language: PreTrainedModel,
    tower: PreTrainedModel,
    eyes: _Tower,
    tokenizer: PreTrainedTokenizerBase,
    options: AssembleOptions,
) -> PreTrainedModel:
    """The stock model built around the given parts, without copying them. Sets torch's seed."""
    # Do not publish the local paths of the parts.
    language.config._name_or_path = tower.config._name_or_path = ""
    shared = {
        "vision_config": tower.config,
        "text_config": language.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": options.feature_layer,
        "vision_feature_select_strategy": eyes.strategy,
        "image_seq_length": eyes.side**2,
        "tie_word_embeddings": language.config.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if options.crops == "none":
        config = (ChainOfSightConfig if options.projector == "resampler" else LlavaConfig)(**shared)
    else:
        config = LlavaNextConfig(**shared, image_grid_pinpoints=eyes.pinpoints(options.crops))
    family_class(config)
    dtype = language.dtype
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.model.language_model, model.lm_head = language.model, language.lm_head
    model.model.vision_tower = tower
    torch.manual_seed(options.seed)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").float()
    for layer in projector.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    projector.to(dtype)
    if options.crops != "none":
        width = config.text_config.hidden_size
        model.model.image_newline = nn.Parameter((torch.randn(width) / width**0.5).to(dtype))
    return model.eval()


def save_checked(model: PreTrainedModel, processor: ProcessorMixin, output: Path, max_shard_size: str) -> None:
    """Write to a temporary folder, check that the stock classes find every key, and rename it."""
    with whole_folder(output) as folder:
        use_released_names(model)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        # On the meta device, names and shapes are compared without reading the weights again.
        _, info = AutoModelForImageTextToText.from_pretrained(folder, device_map="meta", output_loading_info=True)
        problems = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys and name.endswith("_keys")}
        if problems:
            raise SaccadeError(f"output={str(output)!r}: the written model does not load unchanged: {problems}")


def middle_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings of the middle of a larger square, so that neighbours are as far apart as in training.

    Args:
        table: `(n, D)` of a square of patches, or `(1 + n, D)` with a class token first.
        side: patches per side to keep.
    """
    whole = int(len(table) ** 0.5)  # a class token makes it one more than a square
    before = len(table) - whole**2
    first = (whole - side) // 2
    square = table[before:].unflatten(0, (whole, whole))[first : first + side, first : first + side]
    return torch.cat([table[:before], square.flatten(0, 1)])


def resize_plainly(images: Any, size: int) -> None:
    """Make an image processor resize whole images to a square without cropping, as Chain-of-Sight does, in place."""
    images.size = {"height": size, "width": size}
    if getattr(images, "do_center_crop", None) is not None:
        images.do_center_crop = False
    if getattr(images, "crop_size", None) is not None:
        images.crop_size = {"height": size, "width": size}  # read by the code that counts tokens


def _picture_size(images: Any) -> tuple[int, int]:
    """Height and width of an image processor's output."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    edge = getattr(size, "shortest_edge", None)
    return getattr(size, "height", None) or edge, getattr(size, "width", None) or edge


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' report of unused keys, such as those of CLIP's text model."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
