"""Kernels: functions on tensors that run one MoE layer or one linear. `reference` is the truth."""
