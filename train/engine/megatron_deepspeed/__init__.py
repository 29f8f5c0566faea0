"""Megatron-DeepSpeed as an engine: upstream stays unedited, a worker patches it in memory.

`checkout` finds it, `install` brings it, `prepare` renders a run, `worker` runs in each rank, `patches` are what it
needs on today's libraries.
"""
