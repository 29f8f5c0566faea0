"""Checkpoints of the engines: read, check, export to Hugging Face, and prove the result by numbers."""
