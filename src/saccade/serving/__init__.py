"""A trained folder in an engine: vLLM's plug-in, requests prepared for an engine without it, starting a server."""

from saccade.serving.requests import PreparedRequest, vllm_request

__all__ = ["PreparedRequest", "vllm_request"]
