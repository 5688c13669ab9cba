#!/bin/sh
# One real CUDA shard for each card, and one more, in every executor of this machine. For a machine with an NVIDIA card:
#
#     tests/gpu/run.sh                  # with .venv, which `make install` or any `make test` has made
#     PYTHON=python3 tests/gpu/run.sh   # with a Python that has bacalhau-jupyter[docker,gpu]
#
# Needs the driver, and nothing else of CUDA. It ends with 0 if all went well, 1 if a shard failed, 2 if there is no card.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
PYTHONPATH="node:.${PYTHONPATH:+:$PYTHONPATH}" exec "$python" tests/gpu/check.py "$@"
