"""Pretraining of the tiny LLaVA that is embedded in the package."""
