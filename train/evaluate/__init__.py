"""What a model is worth, in numbers: perplexity, SQuAD, exact match, lm-evaluation-harness; before and after."""
