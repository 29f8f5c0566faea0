"""Checkpoints of the transformers engine, which are Hugging Face folders with training state beside them."""
