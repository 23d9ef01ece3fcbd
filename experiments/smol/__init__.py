"""The testbed smol: a LLaVA of a small vision tower and SmolLM2-135M-Instruct, and four tasks that it learns."""
