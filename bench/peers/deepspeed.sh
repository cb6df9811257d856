#!/usr/bin/env bash
# Makes .venv-peers/deepspeed: DeepSpeed with what its CPU accelerator needs. It compiles its own
# kernels, here and not when first timed: a C++ compiler and libaio's headers (Debian: g++, libaio-dev) are needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.venv-peers/deepspeed
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 numpy ninja setuptools wheel transformers==5.23.0
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$venv/bin/python" -m pip install --quiet \
  --no-build-isolation "deepspeed==0.19.*"
[[ -f /usr/include/libaio.h ]] || echo "no libaio.h: the NVMe contestants will fail (Debian: libaio-dev)" >&2
DS_ACCELERATOR=cpu PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" - <<'PY'
from deepspeed.accelerator import get_accelerator

for name in ("CPUAdamBuilder", "AsyncIOBuilder"):
    get_accelerator().create_op_builder(name).load()
PY
