#!/bin/sh
# A timeline of one accelerated generation; docs/profiling.md says how to read it.
#   benchmarks/profile_nsys.sh [FOLDER [options of `_profile_target.py loop`]]
# Writes FOLDER/lesa_loop.nsys-rep and prints where the time went.
set -eu
out=${1:-profiles}
[ $# -eq 0 ] || shift
here=$(cd "$(dirname "$0")" && pwd)
command -v nsys > /dev/null || { echo "nsys is not on PATH: install Nsight Systems." >&2; exit 1; }
mkdir -p "$out"

# What lies between cudaProfilerStart and Stop is recorded, so no warm-up is in the report. The
# kernels of a replayed graph are shown one by one (node): that slows the host, so take times on the
# GPU from here and times of a step from bench_skipped_step.py.
nsys profile \
  --trace=cuda,nvtx,osrt \
  --capture-range=cudaProfilerApi --capture-range-end=stop \
  --cuda-graph-trace=node \
  --sample=none --cpuctxsw=none \
  --force-overwrite=true --output="$out/lesa_loop" \
  "${PYTHON:-python}" "$here/_profile_target.py" loop "$@"

# Time on the host per range, time on the GPU under each range, time per kernel.
nsys stats --force-export=true \
  --report nvtx_sum --report nvtx_gpu_proj_sum --report cuda_gpu_kern_sum \
  "$out/lesa_loop.nsys-rep"
