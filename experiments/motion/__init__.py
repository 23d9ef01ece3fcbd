"""Training on clips: all tokens, pruning only and DualSpeed on digits that move."""
