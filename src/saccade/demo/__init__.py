"""The demo: a small LLaVA trained on real handwritten digits with all tokens, with pruning only, and with DualSpeed."""
