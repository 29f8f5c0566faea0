"""Converts a Hugging Face GPT-2, Llama or Mistral to a checkpoint of Megatron-DeepSpeed, in any layout.

Pretraining begins from it with --initial_checkpoint_dir: the folder's weights, a fresh optimizer, step 0. What was
written is read again and compared, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model

EXAMPLE = """\
convert_huggingface_model_to_megatron_deepspeed.sh \\
      --input_model_dir output/step3_upload_pretrained_model/NAME \\
      --tensor_parallel_size 2 --pipeline_parallel_size 2 \\
      --output_checkpoint_dir output/step2_pretrain_model/initial/NAME_tp2_pp2"""


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ImportSettings, import_model, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
