"""A LLaVA small enough to fine-tune on a laptop CPU in minutes, built from stock Hugging Face classes only."""

from saccade.tiny.model import build_tiny_llava, build_tiny_processor, load_tiny, save_tiny, tiny_checkpoint

__all__ = ["build_tiny_llava", "build_tiny_processor", "load_tiny", "save_tiny", "tiny_checkpoint"]
