"""Kernels that are right and fast, and that no pipeline of lesa runs.

`gram` and `mix_backward` serve `lesa.ops.gram` and the gradients of `lesa.ops.mix`: training solves
on inner products of whole trajectories, which one matrix product gives sooner than pairs of
features would. `fp8` halves the ring's bytes and costs 0.4 dB (`bench_fp8_ring.py`), where the
default tap's ring is 2 MB already.
"""
