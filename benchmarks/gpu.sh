#!/usr/bin/env bash
# Parity and speed on the GPU of this machine, in a few minutes; the table comes last.
# Takes the arguments of gpu.py: `benchmarks/gpu.sh --seconds 240 --only parity 0.16B`.
exec python3 -u "$(dirname "$0")/gpu.py" "$@"
