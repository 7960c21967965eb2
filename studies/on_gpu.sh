#!/usr/bin/env bash
# What is still to be measured on a GPU, in one go. No weights are downloaded.
#
#   bash studies/on_gpu.sh        then read runs/gpu/*.log
#
# speed     tokens/s of ours, with and without the CUDA graph, of transformers and of a plain loop; share of the
#           roofline; whether graph and loop draw the same tokens
# memory    gpu_gb of the rehearsal's steps; its models have few layers, and --dry-run --model FOLDER plans for these
# The sharded parts of the rehearsal need two GPUs, and fail on one.
set -u
cd "$(dirname "$0")/.."
out=runs/gpu
mkdir -p "$out"
nvidia-smi > "$out/gpu.log" 2>&1
for model in Janus-Pro-1B Janus-Pro-7B; do
    for pictures in 8 64; do
        python -m studies.bench --model $model --pictures $pictures --repeats 3 > "$out/$model-$pictures.log" 2>&1
    done
done
pytest -m slow tests/test_sharding.py > "$out/slow.log" 2>&1
python -m studies.rehearse --folder "$out/rehearsal" --device cuda > "$out/rehearsal.log" 2>&1
grep -h gpu_gb "$out"/rehearsal/runs/*/metrics.jsonl | grep -o '"gpu_gb": [0-9.]*' > "$out/memory.log"
tail -n 12 "$out"/*.log
