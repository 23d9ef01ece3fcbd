"""Serving a trained folder: a vLLM plug-in, requests for engines without it, and starting a server."""

from saccade.serving.requests import PreparedRequest, vllm_request

__all__ = ["PreparedRequest", "vllm_request"]
