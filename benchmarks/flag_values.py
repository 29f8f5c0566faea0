"""What a benchmark's words for a launcher say: flag_values("--num_processes 2 --precision=bf16")["--num_processes"]."""

from __future__ import annotations

from train.errors import UserError


def flag_number(words: str, flag: str, default: int) -> int:
    """A flag's last value as a number, or the default where it is not given.

    Raises:
        UserError: it is no number.
    """
    value = flag_values(words).get(flag, str(default))
    if not value.isdigit():
        raise UserError(f"{flag} {value}: a number was expected, in {words.strip()!r}.")
    return int(value)


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
