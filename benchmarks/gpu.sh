#!/bin/sh
# Checks every GPU kernel against its definition and prints the profile, on a machine with a GPU, torch and triton.
# Installs, compiles and downloads nothing; weights are random. One JSON line comes last. Less than 8 minutes.
#   sh benchmarks/gpu.sh                          PYTHON=/path/to/python names another interpreter
#   sh benchmarks/gpu.sh --device cpu --tiny      the same by Triton's interpreter, to try the script itself
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
