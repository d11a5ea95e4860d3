"""How much arithmetic a batch takes: the products of matrices in a model, two operations for every multiply-add.

Left out is what is small beside them: embeddings, norms, activations and the heads of a few columns. Tokens that
carry no example (the dummy sequence) are not counted, so that systems are compared by the work that their data needs.
"""

from torch import nn

from trunkline.engine.network.bilstm import BiLSTM, Model
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.network.trunk import TrunkConfig

BACKWARD = 2  # a backward pass has two products for each of the forward pass


def training_flops(model: Model, batch: PackedBatch) -> float:
    """Operations of a forward and a backward pass; what recomputation adds is left out."""
    if isinstance(model, BiLSTM):
        return (1 + BACKWARD) * _bilstm(model, batch)
    if model.adapters is None:
        return (1 + BACKWARD) * _trunk(model, batch)
    # the trunk's weights get no gradient, which is one of the two products
    return BACKWARD * _trunk(model, batch) + (1 + BACKWARD) * _adapters(model, batch)


def trunk_flops(
    config: TrunkConfig, tokens: float, rows: float, written: float, pairs: float, row_pairs: float
) -> float:
    """Operations of a forward pass through a trunk.

    Args:
        config: its shape.
        tokens: that carry an example.
        rows: labelled tokens; the last block goes on with them alone after its queries, keys and values.
        written: of these, such that predict a token.
        pairs: of a token and one that it sees.
        row_pairs: of these, the pairs of labelled tokens.
    """
    D, E, H, G = config.hidden_size, config.head_width, config.num_heads, config.kv_heads
    gate = 2 if config.gates else 1
    before = config.num_layers - 1  # blocks before the last
    qkv = D * (H + 2 * G) * E * config.num_layers * tokens
    attention = 2 * H * E * (before * pairs + row_pairs)  # scores, and values times them
    after = (D * H * E + (gate + 1) * D * config.mlp_width) * (before * tokens + rows)
    return 2.0 * (qkv + attention + after + D * config.vocab_size * written)


def seen_pairs(batch: PackedBatch, causal: bool) -> tuple[float, float]:
    """Pairs of a token and one that it sees: of all tokens that carry an example, and of the labelled ones."""
    seen = batch.positions + 1 if causal else batch.plan.spans.diff(dim=1).flatten()  # by every token
    return float(seen[: batch.real_tokens].sum()), float(seen[batch.rows.token].sum())


def _trunk(model: MultiTaskModel, batch: PackedBatch) -> float:
    config, rows = model.trunk.config, len(batch.rows.token)
    written = sum(batch.rows.counts[model.num_small + model.num_spans :])
    projections = config.hidden_size**2 * rows if model.activation else 0
    blocks = trunk_flops(config, batch.real_tokens, rows, written, *seen_pairs(batch, config.causal))
    return blocks + 2.0 * projections


def _adapters(model: MultiTaskModel, batch: PackedBatch) -> float:
    """Operations of a forward pass through A and B of every token's adapter; of the last block as of the trunk."""
    assert model.adapters is not None
    last, elements = len(model.trunk.blocks) - 1, {"tokens": 0, "rows": 0}
    for name, module in model.trunk.named_modules():
        layer = model.adapters.layer(name) if isinstance(module, nn.Linear) else None
        if layer is not None:
            on_rows = name.startswith(f"blocks.{last}.") and not name.endswith("qkv")
            elements["rows" if on_rows else "tokens"] += layer.down[0].numel() + layer.up[0].numel()
    return 2.0 * (elements["tokens"] * batch.real_tokens + elements["rows"] * len(batch.rows.token))


def _bilstm(model: BiLSTM, batch: PackedBatch) -> float:
    config, tokens = model.heads.trunk.config, batch.real_tokens
    D, answering = config.hidden_size, len(model.heads.tasks)
    written = sum(batch.rows.counts[answering:])
    texts = sum(batch.examples[answering:])
    per_token = config.num_layers * 2 * 4 * (D // 2) * (D + D // 2)  # both directions, four gates each
    tokens_of = batch.token_offsets.diff()
    pooled = sum(int(tokens_of[int(place)]) for place in model.attention) * D * (D // 2)
    document = int(batch.token_offsets[-1] - batch.token_offsets[answering]) - written  # tokens of all documents
    attended = 2 * D * written * document / max(1, texts)
    per_row = 4 * D * 2 * D + D * D + 2 * D * D + D * config.vocab_size  # LSTM, query, output, vocabulary
    return 2.0 * (per_token * (tokens - written) + pooled + attended + per_row * written)
