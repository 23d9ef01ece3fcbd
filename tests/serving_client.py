"""Asks a server through the stock `openai` client: `python serving_client.py URL JOB.json ANSWERS.json`.

It runs in the environment of `make test-serve`. A job is `model`, the name that the server gives it; `conversations`;
`requests`, their number, which go over the conversations again and again, eight at a time; `max_tokens`; and `extra`,
options of vLLM that make it give ids. Each answer is the token ids of prompt and answer, its `text` where a job has no
`extra`, or the `status` and `error` with which the server refused. In the middle, clients go away before their answer
has come.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import APIStatusError, OpenAI

AT_ONCE = 8
LONG = 400
"""Tokens of an answer whose reader goes away."""


def main(url: str, job: str, answers: str) -> None:
    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    given = json.loads(Path(job).read_text())

    def ask(number: int) -> dict:
        conversation = given["conversations"][number % len(given["conversations"])]
        options = {"model": given["model"], "temperature": 0}
        if number % 50 == 25:
            stream = client.chat.completions.create(
                **options,
                messages=given["conversations"][0],
                max_tokens=LONG,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            next(iter(stream))
            stream.close()
        try:
            answer = client.chat.completions.create(
                **options,
                messages=conversation,
                max_tokens=given["max_tokens"],
                extra_body=given.get("extra"),
            )
        except APIStatusError as error:
            return {"status": error.status_code, "error": error.body["message"]}
        choice = answer.choices[0]
        if "extra" not in given:
            return {"text": choice.message.content}
        return {"prompt": answer.prompt_token_ids, "answer": choice.token_ids}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(ask, range(given["requests"])))
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
