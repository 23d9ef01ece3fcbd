"""How the tiny LLaVA that the package embeds was pretrained."""
