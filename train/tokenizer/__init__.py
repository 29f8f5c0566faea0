"""SentencePiece training, conversion to Hugging Face, and the proof that both tokenize alike."""
