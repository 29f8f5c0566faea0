"""Checkpoints of Megatron-DeepSpeed: read safely, merged over tensor ranks, exported as Hugging Face weights."""
