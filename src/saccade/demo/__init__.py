"""The demo: a small LLaVA trained on handwritten digits with all tokens, with pruning only, and with DualSpeed."""
