"""Writes sample data made from the docstrings of this machine's Python: documents for steps 1 and 2, conversations
for step 4.

The demo trains on it. Sources are read, never run; the same Python always gives the same files.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.data.sample_data import SampleDataSettings, make_sample_data


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the sample data; see --help."""
    return cli.run(
        SampleDataSettings,
        make_sample_data,
        argv,
        description=__doc__,
        example="python scripts/common/make_sample_data.py --output_dir sample_data --packages numpy",
    )


if __name__ == "__main__":
    raise SystemExit(main())
