#!/bin/bash
#SBATCH --job-name=gpt_0.1B
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output="/shared/out/job/gpt 0.1B.%j.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#
# again:    sbatch '/shared/out/job/gpt 0.1B_20260102_030405.sh'
# by hand:  bash '/shared/out/job/gpt 0.1B_20260102_030405.sh'
set -euo pipefail
cd -- '/home/me/my project'
export PATH=/opt/bin:"${PATH}"
export TRAIN_PYTHON=/p/python
job_id="${SLURM_JOB_ID:-}"
exit_record='/shared/out/job/gpt 0.1B_20260102_030405.exit'

finish() {
    if [[ -n "${job_id}" ]]; then
        echo "${job_id} $1" >"${exit_record}" || true
    fi
    exit "$1"
}

child=
signalled=
pass_on() {
    signalled=1
    if [[ -n "${child}" ]]; then
        kill -TERM "${child}" 2>/dev/null || true
    fi
}
trap pass_on TERM INT
echo "job ${job_id:-by hand} begins on $(uname -n) at $(date '+%Y-%m-%d %H:%M:%S')"
bash /shared/train/pretrain.sh --recipe '/shared/out/job/gpt 0.1B_20260102_030405.yaml' --num_nodes 2 "$@" &
child=$!
if [[ -n "${signalled}" ]]; then
    pass_on
fi
status=0
wait "${child}" || status=$?
while [[ -n "${signalled}" ]]; do # a signal ends the wait, not the run
    signalled=
    status=0
    wait "${child}" || status=$?
done
finish "${status}"
