"""Compiled passes of the block: faster ways to compute what `models/` computes in plain torch.

A kernel registers itself with `models/passes_cbam2`, which works without any; it gives the same values to rounding.
Everything may change here but the two names that switch it, `enable_cpu_kernel` and `disable_cpu_kernel`.
"""
