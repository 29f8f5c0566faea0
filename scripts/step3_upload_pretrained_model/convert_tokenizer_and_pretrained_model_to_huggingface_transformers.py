"""Converts a SentencePiece tokenizer and a pretrained checkpoint to one Hugging Face folder, and verifies it.

The folder holds safetensors, config.json, generation_config.json, the tokenizer's files, verification.json and
manifest.json. It appears once weights, logits, tokenizer and configuration are proven, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.checkpoint.convert import ConvertSettings, convert

EXAMPLE = """\
convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh \\
      --input_tokenizer_file output/step1_train_tokenizer/NAME/NAME.model \\
      --input_model_max_length 2048 \\
      --input_model_dir output/step2_pretrain_model/checkpoint/JOB/global_step1000 \\
      --output_tokenizer_and_model_dir output/step3_upload_pretrained_model/JOB_global_step1000"""


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ConvertSettings, convert, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
