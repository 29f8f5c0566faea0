#!/usr/bin/env bash
# The seeds' finetuning on OpenAssistant under ZeRO-3: finetune.sh with the recipe openassistant_zero3.
#
# usage:    launcher-deepspeed_zero-3.sh --input_model_name_or_path MODEL --input_max_seq_length TOKENS \
#               --output_tokenizer_and_model_dir DIR --wandb_entity ENTITY --wandb_project PROJECT [--wandb_tag TAG]
#           and any flag of finetune.sh, such as --data_files FILE
# example:  launcher-deepspeed_zero-3.sh --input_model_name_or_path me/gpt_0.125B --input_max_seq_length 2048 \
#               --output_tokenizer_and_model_dir output/gpt_0.125B_openassistant --wandb_entity me --wandb_project p
# environment: TRAIN_RECIPE  another recipe instead, to try the command with a small model
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
flags=()
for word in "$@"; do
    case "${word}" in
        --input_model_name_or_path | --input_model_name_or_path=*) word="--${word#--input_}" ;;
        --input_max_seq_length | --input_max_seq_length=*) word="--${word#--input_}" ;;
        --output_tokenizer_and_model_dir | --output_tokenizer_and_model_dir=*)
            word="--output_dir${word#--output_tokenizer_and_model_dir}"
            ;;
    esac
    flags+=("${word}")
done
exec bash "${here}/../../finetune.sh" --recipe "${TRAIN_RECIPE:-openassistant_zero3}" "${flags[@]}"
