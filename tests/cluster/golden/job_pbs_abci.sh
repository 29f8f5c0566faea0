#!/bin/bash
#PBS -N gpt_0.1B
#PBS -S /bin/bash
#PBS -l select=2
#PBS -l walltime=36:00:00
#PBS -q rt_HF
#PBS -P gca50000
#PBS -M me@example.org
#PBS -m bea
#PBS -j oe
#PBS -r y
#
# again:    qsub '/shared/out/job/gpt 0.1B_20260102_030405.sh'
# by hand:  bash '/shared/out/job/gpt 0.1B_20260102_030405.sh'
set -euo pipefail
cd -- '/home/me/my project'
export PATH=/opt/bin:"${PATH}"
export TRAIN_PYTHON=/p/python
job_id="${PBS_JOBID:-}"
exit_record='/shared/out/job/gpt 0.1B_20260102_030405.exit'
# the log that can be watched; the scheduler's own copy comes late, or not at all
if [[ -n "${job_id}" ]]; then
    exec >>'/shared/out/job/gpt 0.1B.'"${job_id}".log 2>&1
fi

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
