#!/usr/bin/env bash
# What is still to be measured on one GPU of 80 GB or more. No weights are downloaded.
#
#   bash studies/on_gpu.sh        about ten minutes; then read runs/gpu/*.log
#   OUT=FOLDER PYTHON=python3.12 bash studies/on_gpu.sh
#
# graph      does the recorded loop draw the tokens of the unrecorded one, also after an update, and with LoRA?
# rehearsal  the recipes' steps, with a few layers; gpu_gb is the memory that they took
# speed      tokens/s with and without the CUDA graph, of transformers and of a plain loop; share of the roofline
# Each part has its own log and its own limit of time. The sharded parts of the rehearsal take two GPUs, or the only one.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
nvidia-smi > "$out/gpu.log" 2>&1
timeout 120 "$python" -m pytest tests/test_cuda_graph.py > "$out/graph.log" 2>&1
timeout 240 "$python" -m studies.rehearse --folder runs/rehearsal --device cuda > "$out/rehearsal.log" 2>&1
grep -o '"gpu_gb": [0-9.]*' runs/rehearsal/runs/*/metrics.jsonl > "$out/memory.log"
for model in Janus-Pro-1B Janus-Pro-7B; do
    timeout 150 "$python" -m studies.bench --model $model --pictures 64 --repeats 1 > "$out/$model.log" 2>&1
done
tail -n 12 "$out"/*.log
