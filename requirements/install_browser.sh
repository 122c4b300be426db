#!/usr/bin/env bash
# Chromium for the tests of the web page: found, or installed where we are root on Debian or Ubuntu.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "[setup] error: no Chromium here; install it with your system's package manager" >&2
    exit 2
fi
echo "[setup] installing chromium" >&2
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null
