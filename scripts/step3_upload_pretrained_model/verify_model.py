"""Verifies a Hugging Face folder that is there already, and writes verification.json into it.

It is loaded anew and held against the checkpoint and the SentencePiece model it was made from, as far as they are
still there.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.checkpoint.verify_folder import VerifySettings, verify_folder

EXAMPLE = "verify_model.py --input_tokenizer_and_model_dir output/step3_upload_pretrained_model/JOB_global_step1000"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(VerifySettings, verify_folder, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
