"""Tells what is in a .bin/.idx pair: documents, tokens, the largest id against a vocabulary; decodes a document."""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.data.inspect import InspectSettings, inspect_data


def main(argv: Sequence[str] | None = None) -> int:
    """Looks into the data; see --help."""
    return cli.run(
        InspectSettings,
        inspect_data,
        argv,
        description=__doc__,
        example="python scripts/step2_pretrain_model/inspect_data.py --data data/corpus_text_document "
        "--input_tokenizer_file tokenizer/tokenizer.model --document 0",
    )


if __name__ == "__main__":
    raise SystemExit(main())
