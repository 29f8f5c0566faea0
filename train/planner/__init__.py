"""Memory and speed of a layout before the queue: which one fits, and which one is the fastest."""
