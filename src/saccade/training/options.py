"""The options of a recipe about the model, the data and LoRA."""

from dataclasses import dataclass
from typing import Any


@dataclass
class ModelOptions:
    """The model to train and the data to train on.

    Args:
        model: folder or hub id of a stock checkpoint; "tiny" is the embedded model.
        dtype: dtype to load the weights in: "auto", "float32", "bfloat16" or "float16".
        dataset: "digits" for the embedded scenes; a JSON, JSON-lines or Parquet file; a folder with Parquet files or
            written by `save_to_disk`; a hub id; or a list of these and of mappings with `path` and optionally
            `format`, `weight`, `rows`, `image_folder`, `split`.
        dataset_format: "llava" for rows with `conversations`, "chat" for rows with `messages`, "auto" to infer it from
            the rows.
        dataset_streaming: stream the rows, for data that fits neither in memory nor on disk.
        dataset_shuffle_buffer: for a stream: size of the shuffle buffer; 0 keeps the order.
        dataset_split: split to train on.
        dataset_stage: for "digits": "pretrain" (captions) or "sft" (questions).
        dataset_rows: for "digits": number of rows to make; for others, how many rows to use from the start, by default
            all.
        dataset_seed: for "digits": selects the sequence of scenes; for others: seed of sampling a mixture and of
            shuffling a stream.
        dataset_grid: for "digits": patches per side.
        dataset_turns: for "digits": questions about each image.
        eval_dataset: rows to evaluate on while training, in any form that `dataset` has, read with the same options;
            for "digits", its validation split. `eval_strategy` says when.
        eval_rows: at most so many of them; for "digits", 500 when left out.
        eval_share: in place of `eval_dataset`, hold out this share of the rows of `dataset`, in (0, 1).
        attn_implementation: of the model, such as "sdpa", "eager" or "flash_attention_2"; its own choice when left
            out.
        image_folder: folder, or several, that image paths are relative to; by default that of the data file.
        allow_outside_images: accept image paths that lead outside these folders.
        lora: train low-rank adapters of the language model, and the projector in full.
        lora_r: rank of the adapters.
        lora_alpha: scale of the adapters.
        lora_dropout: dropout before the adapters.
        lora_target_modules: names of the layers to adapt, or a regular expression of whole names, as PEFT takes them;
            every linear layer of the decoder when left out.
        lora_modules_to_save: names of the modules to train in full beside the adapters; the projector when left out.
        load_in_4bit: keep the decoder's weights in four bits (QLoRA: NF4, double quantization) under the adapters;
            needs `lora` and bitsandbytes.
        resume: "auto" resumes from the newest complete checkpoint of the run that `output_dir` belongs to, if there is
            one; a path names a checkpoint.
    """

    model: str = "tiny"
    dtype: str = "auto"
    dataset: str | list[Any] = "digits"
    dataset_format: str = "auto"
    dataset_streaming: bool = False
    dataset_shuffle_buffer: int = 1000
    dataset_split: str = "train"
    dataset_stage: str = "sft"
    dataset_rows: int | None = None
    dataset_seed: int = 0
    dataset_grid: int = 12
    dataset_turns: int = 1
    eval_dataset: str | list[Any] | None = None
    eval_rows: int | None = None
    eval_share: float | None = None
    attn_implementation: str | None = None
    image_folder: str | list[str] | None = None
    allow_outside_images: bool = False
    lora: bool = False
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    load_in_4bit: bool = False
    resume: str | None = None
