"""The Hugging Face Hub: the model card, written from manifests, and the upload."""
