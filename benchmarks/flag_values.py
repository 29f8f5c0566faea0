"""What a benchmark's words for a launcher say: flag_values("--num_processes 2 --precision=bf16")["--num_processes"]."""

from __future__ import annotations


def flag_values(words: str) -> dict[str, str]:
    """Each flag's last value; "" for a flag that stands alone."""
    found: dict[str, str] = {}
    flag = ""
    for word in words.split():
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = value
        elif flag and not found[flag]:
            found[flag] = word
    return found
