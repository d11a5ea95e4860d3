"""`torch.nn.MultiheadAttention` on our kernels.

B batch, S query tokens, K key tokens, E embedding width, H heads, D = E / H
Source: the docstring of torch.nn.MultiheadAttention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.engine.foreign.drop_in import count_call, scaled_dot_product_attention


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: the same parameters, state_dict, defaults and errors.

    A query whose keys are all masked gets attention 0, hence `out_proj.bias`, where PyTorch's own gives NaN. Our
    kernels take `need_weights=False` with no mask, with the causal hint, or with a bool `key_padding_mask` that keeps
    one stretch of keys in every row. The rest is left to PyTorch, and so is `need_weights=True`, the default, because
    no fused kernel has the weights to give.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`.

        Args:
            query: (S, B, E), (B, S, E) with `batch_first`, or (S, E) for one sequence.
            key: (K, B, kdim), likewise.
            value: (K, B, vdim), likewise.
            key_padding_mask: (B, K), or (K,) for one sequence; True: the key is ignored. Numbers are added to scores.
            need_weights: also return the weights, which costs (B, H, S, K) of memory.
            attn_mask: (S, K) or (B * H, S, K); True: the query does not see the key. Numbers are added to scores.
            average_attn_weights: weights are averaged over heads, (B, S, K), instead of (B, H, S, K).
            is_causal: a hint that `attn_mask` is the causal mask; needs that mask, too.

        Returns:
            Output like `query`, and the weights or None.
        """
        if not self._ours(query, key, value, key_padding_mask, attn_mask, is_causal):
            result = super().forward(  # knows what is wrong, or what to do
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            count_call("MultiheadAttention", left_to_torch="bias_k, bias_v or add_zero_attn")
            return result
        batched = query.ndim == 3
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = self._project(query, key, value)  # (B, H, S, D), (B, H, K, D)
        dropout = self.dropout if self.training else 0.0
        causal = is_causal and key_padding_mask is None and not need_weights  # only then PyTorch trusts the hint
        mask = None if causal else _sdpa_mask(attn_mask, key_padding_mask, q)
        if need_weights:
            out, weights = _with_weights(q, k, v, mask, dropout)
            count_call("MultiheadAttention", left_to_torch="need_weights=True")
        else:
            out, weights = scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
            count_call("MultiheadAttention")
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, S, E)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        if not batched:
            return out[0], weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _ours(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the inputs are right and nothing is added to the keys."""
        dims = query.ndim
        if dims not in (2, 3) or not key.ndim == value.ndim == dims or query.is_nested:
            return False
        along = 1 if dims == 3 and self.batch_first else 0  # the dimension of tokens
        S, K = query.shape[along], key.shape[along]
        batch = [query.shape[1 - along]] if dims == 3 else []
        heads = self.num_heads * (batch[0] if batch else 1)
        return (
            self.bias_k is None
            and not self.add_zero_attn
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
            and key.shape[:-1] == value.shape[:-1]
            and (dims == 2 or key.shape[1 - along] == query.shape[1 - along])
            and (key_padding_mask is None or _is_mask(key_padding_mask, [*batch, K]))
            and (attn_mask is None or _is_mask(attn_mask, [S, K]) or _is_mask(attn_mask, [heads, S, K]))
            and not (is_causal and attn_mask is None)
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        inputs = [query, key, value]
        if query.ndim == 2:
            inputs = [x[None] for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if query is key is value and self.in_proj_weight is not None:
            projected = list(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            weights = (
                (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
                if self.in_proj_weight is None
                else self.in_proj_weight.chunk(3)
            )
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = [F.linear(*triple) for triple in zip(inputs, weights, biases, strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]


def _is_mask(mask: Tensor, shape: list[int]) -> bool:
    return list(mask.shape) == shape and (mask.dtype == torch.bool or mask.is_floating_point())


def _sdpa_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The masks of `MultiheadAttention` as one of `scaled_dot_product_attention`, where True is what is seen."""
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.view(*q.shape[:2], *attn_mask.shape[1:])  # (B * H, S, K) -> (B, H, S, K)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] | masks[-1])
    numbers = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(numbers[1:], start=numbers[0]).to(q.dtype)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, S, D) and weights (B, H, S, K); both are 0 for a query that sees no key."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = F.dropout(scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0), dropout)
    return weights @ v, weights
