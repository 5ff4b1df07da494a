"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter.

tests/conftest.py says so before any kernel is defined.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moeq.experts import ExpertWeights

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    from tests.kernels.triton import interpreter

    interpreter.repair()

DEVICE = torch.device("cuda:0" if HAS_GPU else "cpu")

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


def to_device(weights: ExpertWeights) -> ExpertWeights:
    """The same layer where the kernels run."""
    moved = {
        field.name: value.to(DEVICE)
        for field in dataclasses.fields(weights)
        if isinstance(value := getattr(weights, field.name), Tensor)
    }
    return dataclasses.replace(weights, **moved)
