#!/usr/bin/env bash
# Makes .venv-peers/accelerate: Hugging Face accelerate beside the same torch and transformers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.venv-peers/accelerate
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 numpy transformers==5.23.0 "accelerate==1.*"
