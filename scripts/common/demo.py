#!/usr/bin/env python3
"""Runs the five steps on this machine's CPU, on the docstrings of its own Python, and prints what came out."""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.demo import DemoSettings, demo


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(DemoSettings, demo, argv, description=__doc__, example="make demo")


if __name__ == "__main__":
    raise SystemExit(main())
