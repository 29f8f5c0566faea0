#!/bin/bash
#$ -N gpt_0.1B
#$ -S /bin/bash
#$ -l rt_F=2
#$ -l h_rt=36:00:00
#$ -M me@example.org
#$ -m bea
#$ -j y
#$ -o /shared/out/job/gpt_0.1B.$JOB_ID.log
#$ -r y
#
# again:    qsub -g gca50000 /shared/out/job/gpt_0.1B_20260102_030405.sh
# by hand:  bash /shared/out/job/gpt_0.1B_20260102_030405.sh
set -euo pipefail
cd -- '/home/me/my project'
export PATH=/opt/bin:"${PATH}"
export TRAIN_PYTHON=/p/python
job_id="${JOB_ID:-}"
exit_record=/shared/out/job/gpt_0.1B_20260102_030405.exit

finish() {
    if [[ -n "${job_id}" ]]; then
        echo "${job_id} $1" >"${exit_record}" || true
    fi
    exit "$1"
}

# done (0), or an end that the next job would only repeat: wrong settings (2), a failed proof (3), a lost loss (4)
if [[ -n "${job_id}" && -s "${exit_record}" ]]; then
    read -r former_id former_status <"${exit_record}"
    if [[ "${former_id}" != "${job_id}" && "${former_status}" =~ ^[0234]$ ]]; then
        echo "job ${former_id} of this chain ended with exit code ${former_status}: nothing is left to do for ${job_id}"
        exit "${former_status}"
    fi
fi

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
bash /shared/train/pretrain.sh --recipe /shared/out/job/gpt_0.1B_20260102_030405.yaml --num_nodes 2 "$@" &
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
