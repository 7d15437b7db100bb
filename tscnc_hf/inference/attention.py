"""Attention among few tokens without a mask, by a kernel that keeps a head's keys and scores in cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.inference.operators import has_tangent


LANES = 16  # numbers in the widest vector; a narrower one fits into it
MOST_TOKENS = 1024  # for more, torch's own kernel is as fast or faster


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """
    `torch.nn.functional.scaled_dot_product_attention`, and nothing but this where a mask, dropout, a derivative,
    another dtype or a negative scale is asked for, heads differ in their sizes or are no multiple of a vector, or
    there are no tokens, or many.
    """
    plain = attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa
    same = query.ndim == 4 and key.shape == value.shape and query.shape[:2] == key.shape[:2]
    if (
        plain
        and same
        and (scale is None or scale >= 0)
        and query.numel() > 0
        and key.numel() > 0
        and query.shape[3] == key.shape[3]
        and query.shape[3] % LANES == 0
        and key.shape[2] <= MOST_TOKENS
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (query, key, value))
        and not any(map(has_tangent, (query, key, value)))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
    ):
        return torch.ops.tscnc.attention.default(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
