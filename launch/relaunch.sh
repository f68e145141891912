#!/usr/bin/env bash
# Runs a training command again for as long as its exit code asks for that (docs/run.md).
#
#     launch/relaunch.sh python -m launch.train --config configs/latents.py --workdir runs/latents
#
# PREEMPTED=stop ends on 42 too, for a scheduler that brings the job back by itself.
set -uo pipefail

restarts=10 # in a row that brought no new checkpoint
workdir="" previous=""
for word in "$@"; do
    [[ $word == --workdir=* ]] && workdir=${word#--workdir=}
    [[ $previous == --workdir ]] && workdir=$word
    previous=$word
done
[[ -n $workdir ]] || { echo "error: --workdir is not given" >&2; exit 4; }
newest() { ls "$workdir/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -1; }

left=$restarts
while true; do
    before=$(newest)
    "$@"
    code=$?
    case $code in
        0 | 3 | 4 | 5 | 6 | 7) exit $code ;; # done, or a person must look
        42) [[ ${PREEMPTED:-} == stop ]] && exit 42 ;;
    esac # others: a process broke (70) or is gone (134, 137, 143)
    if [[ $(newest) == "$before" ]]; then left=$((left - 1)); else left=$restarts; fi
    ((left > 0)) || { echo "error: $restarts restarts without a new checkpoint" >&2; exit $code; }
    echo "exit code $code: again, from step $(newest)" >&2
    sleep 10
done
