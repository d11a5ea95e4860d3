"""Every op on small ragged inputs. Sizes are chosen so that few kernels must be compiled: widths are multiples of 16
unless their being odd is the case."""

from collections.abc import Iterator

import torch

from virtual_gpu.case import Case
from virtual_gpu.cases import adapters, attention, linear_layers, losses


def all_cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from attention.cases(dtype)
    yield from linear_layers.projections(dtype)
    yield from linear_layers.gradients(dtype)
    yield from adapters.cases(dtype)
    yield from losses.small_heads(dtype)
    yield from losses.small_heads_logits(dtype)
    yield from losses.vocabularies(dtype)
