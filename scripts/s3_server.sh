#!/usr/bin/env bash
# Installs the S3 server of the tests of remote shards (tests/it/remote) in target/s3: moto, 26 MB.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/s3
if ! $venv/bin/python -c 'import moto.server' 2>/dev/null; then
    python3 -m venv --clear $venv
    $venv/bin/pip install --quiet --disable-pip-version-check 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
fi
