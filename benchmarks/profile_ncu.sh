#!/bin/sh
# Hardware counters of every kernel; docs/profiling.md says how to read them.
#   benchmarks/profile_ncu.sh [FOLDER [options of `_profile_target.py kernels`]]
# Writes FOLDER/lesa_kernels.ncu-rep and prints the figures that matter, also into lesa_kernels.csv.
set -eu
out=${1:-profiles}
[ $# -eq 0 ] || shift
here=$(cd "$(dirname "$0")" && pwd)
command -v ncu > /dev/null || { echo "ncu is not on PATH: install Nsight Compute." >&2; exit 1; }
mkdir -p "$out"
metrics=gpu__time_duration.sum
metrics=$metrics,dram__bytes_read.sum,dram__bytes_write.sum
metrics=$metrics,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics=$metrics,sm__warps_active.avg.pct_of_peak_sustained_active
metrics=$metrics,launch__registers_per_thread,launch__waves_per_multiprocessor

# Our kernels only: those of Triton are called _kernel, _flat_kernel and so on, those of csrc mix and
# mix_modulate. The clocks are left as they are, so that the times are those of the benchmarks.
ncu \
  --set full --metrics "$metrics" \
  --profile-from-start off \
  --kernel-name-base function --kernel-name 'regex:^(_([a-z]+_)?kernel|mix|mix_modulate)$' \
  --clock-control none \
  --force-overwrite --export "$out/lesa_kernels" \
  "${PYTHON:-python}" "$here/_profile_target.py" kernels "$@"

ncu --import "$out/lesa_kernels.ncu-rep" --page raw --csv --metrics "$metrics" \
  | tee "$out/lesa_kernels.csv"
