"""Uploads a tokenizer and a finetuned model to the Hugging Face Hub, with a model card written from the manifests.

The model must be verified and must say something to --test_prompt_text first. The repository is private unless
--public is given. The token comes from HF_TOKEN or `hf auth login`. An interrupted upload goes on when run again.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.hub.upload import UploadSettings, upload

EXAMPLE = """\
python scripts/step5_upload_finetuned_model/upload_tokenizer_and_finetuned_model_to_huggingface_hub.py \\
      --input_tokenizer_and_model_dir output/step4_finetune_model/JOB_global_step1000_conversations \\
      --output_model_name JOB_global_step1000_conversations \\
      --test_prompt_text "Once upon a time," """


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(UploadSettings, upload, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
