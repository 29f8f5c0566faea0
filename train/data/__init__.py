"""Documents in, tokens out: reading text files, tokenizing them into Megatron's .bin/.idx, blending and sampling."""
