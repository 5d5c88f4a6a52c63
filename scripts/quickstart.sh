#!/usr/bin/env bash
# Builds and installs asymq into .venv, then fills the paper's Table 2: of a small GPT-2 trained on
# the spot, or of the one named by --model. Options are those of scripts/table2.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
work=$root/build/quickstart

step "Environment" create_environment
if [[ " $* " == *" --model"* ]]; then
  step "Build and install" install_package experiments
  step "Table 2" python scripts/table2.py --out "$work/results" "$@"
else
  step "Build and install" install_package quickstart
  step "A small GPT-2" python -m asymq.experiments.common.quickstart "$work"
  # Few steps, several seeds: after some forty steps at 1e-2 so small a model is chaotic.
  step "Table 2" python scripts/table2.py --model "$work/gpt2-topics" --data "$work/text" \
    --steps 20 --eval-every 10 --seeds 3 --out "$work/table2" "$@"
fi
