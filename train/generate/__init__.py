"""Asking a model: which one, what, and how its answer is drawn. `train.finetune.generate` is the front door."""
