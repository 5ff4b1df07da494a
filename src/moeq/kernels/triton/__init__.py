"""Fused MoE kernels for NVIDIA GPUs, in Triton."""
