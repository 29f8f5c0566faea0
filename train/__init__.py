"""From raw text to an instruction-tuned language model, on your own machines: the library behind scripts/."""

__version__ = "0.1.0"
