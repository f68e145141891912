#!/usr/bin/env bash
# One run on a TPU slice: the same command on every VM, where ~/gear_jax has this code and its .venv.
#
#     gcloud compute tpus tpu-vm ssh SLICE --zone ZONE --worker=all --command \
#         "cd gear_jax && launch/tpu_vm/train.sh --config configs/latents.py --workdir /shared/latents"
#
# --workdir lies on a disk that all VMs share. The processes find each other by the slice's metadata;
# those of a VM that is late are waited for (5 minutes), so every VM may launch again by itself.
set -uo pipefail

log=run-$(date +%Y%m%d-%H%M%S)-$(hostname).log
# in a session of its own: a broken ssh connection does not end it
setsid nohup launch/relaunch.sh .venv/bin/python -m launch.train "$@" > "$log" 2>&1 < /dev/null &
echo "$(hostname): running as process $!, says all in $log; stop and save with: pkill -TERM -f [l]aunch.train"
