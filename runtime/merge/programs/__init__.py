"""Programs beside merging: LoRA adapters extracted, tokenizers transplanted, routers made."""
