#!/usr/bin/env bash
# Builds and installs asymq into .venv, then learns the ranges of normal data in three parameterizations.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
step "Environment" create_environment
step "Build and install" install_package
step "Range learning" python -m asymq.experiments.demo "$@"
