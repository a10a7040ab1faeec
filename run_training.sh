#!/usr/bin/env bash
# The default training: the baseline GPT-2 on TinyStories. Further options go to the training itself.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] && default=.venv/bin/python || default=python
exec "${PYTHON:-$default}" scripts/training/train_gpt2.py \
  --model-config configs/models/gpt2-8k-2l.yaml \
  --training-config configs/training/gpt2-8k.yaml \
  --data-config configs/data/tinystories-8k.yaml "$@"
