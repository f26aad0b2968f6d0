"""Arithmetic, memory and communication of a training step as formulas; docs/how-to/scaling.md explains them.

Llama-like models: N_b weights in the blocks' projections, N in all, L blocks of width d, q = heads · head width, k the
same for keys or values, f the inner width, V the vocabulary. A part of a batch has τ tokens that answers are predicted
from (no padding, and not the last of a sequence) in sequences of T, and n labels. Both parts of a batch go through the
model in one pass, unless a regulariser goes back through the forget part alone and the weights are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shapes import SHAPES

#: Bytes per trained weight that the regulariser holds in float32 (attribution.md): A_{t−1} for good, g within a step.
ANCHOR, GRADIENT = 4, 4
#: Weights it works on together in a step, on a GPU (where larger ones stand alone) and on a CPU; bytes per weight of
#: the temporaries (A_t, its growth twice, the mask).
CHUNK, CHUNK_CPU, CHUNK_BYTES = 1 << 24, 1 << 18, 16


@dataclass(frozen=True)
class Model:
    """Sizes of a model in :data:`~shapes.SHAPES`.

    Example:
        >>> round(Model("3b").parameters / 1e9, 2)
        3.21
    """

    shape: str

    def __getattr__(self, name: str) -> Any:
        """Of the configuration."""
        return SHAPES[self.shape][name]

    @property
    def queries(self) -> int:
        """Width of a block's queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of a block's keys, or values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def block(self) -> int:
        """Weights of a block's projections."""
        d = self.hidden_size
        return 2 * d * self.queries + 2 * d * self.keys + 3 * d * self.intermediate_size

    @property
    def blocks(self) -> int:
        """Weights of all blocks' projections, N_b."""
        return self.num_hidden_layers * self.block

    @property
    def embeddings(self) -> int:
        """Embedding, and output head where it is not the same."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def norms(self) -> int:
        """Of the blocks."""
        return 2 * self.num_hidden_layers * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights, N."""
        return self.blocks + self.norms + self.hidden_size + self.embeddings

    def adapters(self, rank: int = 16) -> int:
        """Weights of LoRA on all projections."""
        d, f = self.hidden_size, self.intermediate_size
        ends = 2 * (d + self.queries) + 2 * (d + self.keys) + 3 * (d + f)
        return self.num_hidden_layers * rank * ends


@dataclass(frozen=True)
class Part:
    """One part of a batch, on one device.

    Args:
        sequences: B.
        length: T, tokens.
        labels: n; None for half of the tokens.
    """

    sequences: int
    length: int
    labels: int | None = None

    @property
    def tokens(self) -> int:
        """How many there are that something is predicted from, τ."""
        return self.sequences * (self.length - 1)

    @property
    def n_labels(self) -> int:
        """How many there are, n."""
        return self.sequences * self.length // 2 if self.labels is None else self.labels

    @property
    def pairs(self) -> int:
        """Pairs of tokens within sequences, which are laid out for attention as long as the longest."""
        return self.sequences * self.length**2


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def forward_flops(model: Model, part: Part) -> float:
    """``2 N_b τ + 4 L q B T² + 2 V d n``: projections, attention (not halved for causality), logits at labels only."""
    attention = 4 * model.num_hidden_layers * model.queries * part.pairs
    logits = 2 * model.vocab_size * model.hidden_size * part.n_labels
    return 2 * model.blocks * part.tokens + attention + logits


def backward_flops(model: Model, part: Part, checkpointing: bool = False, attention_factor: float = 2.5) -> float:
    """Twice the forward pass; attention 2.5 times, as fused kernels compute its scores again.

    Args:
        model: The model.
        part: Of the batch.
        checkpointing: Whether activations are recomputed: another forward pass of the blocks.
        attention_factor: 2 for kernels that keep the scores.
    """
    attention = 4 * model.num_hidden_layers * model.queries * part.pairs
    linear = 2 * model.blocks * part.tokens
    logits = 2 * model.vocab_size * model.hidden_size * part.n_labels
    return 2 * (linear + logits) + attention_factor * attention + (linear + attention if checkpointing else 0)


def step_flops(model: Model, forget: Part, retain: Part, ssiuu: bool, sharded: bool = False, **kwargs: Any) -> float:
    """Forward and backward over both parts; SSIUU's two-pass route adds a backward pass over what is in the pass.

    Args:
        model: The model.
        forget: Part of the batch.
        retain: Part of the batch.
        ssiuu: Whether the step is regularised.
        sharded: Whether the weights are cut by FSDP2: the extra pass then goes through both parts.
        **kwargs: As of :func:`backward_flops`.
    """
    flops = sum(forward_flops(model, part) + backward_flops(model, part, **kwargs) for part in (forget, retain))
    again = [forget, *([retain] if sharded else [])] if ssiuu else []
    return flops + sum(backward_flops(model, part, **kwargs) for part in again)


# ---- memory ---------------------------------------------------------------------------------------------------------


def block_bytes(model: Model, part: Part, width: int, lora: bool = False) -> float:
    """What one block keeps for the backward pass: ``c d + 2 a (q + k) + 4 a f`` bytes per token.

    c is 24 in float32 and 16 in bfloat16: the norms compute in float32.

    Args:
        model: The model.
        part: Of the batch.
        width: a, bytes of an activation.
        lora: Adapters on all projections, in float32: each keeps its input once more where that is narrower.
    """
    d, q, k, f = model.hidden_size, model.queries, model.keys, model.intermediate_size
    per_token = (24 if width == 4 else 16) * d + 2 * width * (q + k) + 4 * width * f
    return part.tokens * (per_token + (4 * (5 * d + q + f) if lora and width != 4 else 0))


def activation_bytes(model: Model, part: Part, width: int, checkpointing: bool = False, lora: bool = False) -> float:
    """What a forward pass keeps: its blocks' or, with checkpointing, their inputs; logits and log-probabilities."""
    logits = part.n_labels * model.vocab_size * (width + 4)
    block = width * model.hidden_size * part.tokens if checkpointing else block_bytes(model, part, width, lora)
    return model.num_hidden_layers * block + logits


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        weight: Bytes per weight and per gradient: 4 or 2.
        optimizer: Bytes per trained weight of the optimiser's states: AdamW 2 · ``weight``, 8-bit AdamW 2.
        ranks: Devices.
        sharded: FSDP2 instead of DDP.
        checkpointing: Whether activations are recomputed.
        rank: Of LoRA; None trains all weights.
        frozen: With LoRA, bytes per weight of the blocks: 2, 1 (8-bit) or 0.52 (4-bit with doubly quantised constants).
        chunk: Weights that the regulariser works on together.
    """

    weight: int = 2
    optimizer: float = 4
    ranks: int = 1
    sharded: bool = False
    checkpointing: bool = True
    rank: int | None = None
    frozen: float = 2
    chunk: int = CHUNK


def memory_bytes(model: Model, forget: Part, retain: Part, ssiuu: bool, setup: Setup) -> dict[str, float]:
    """The most that one device needs in a step, by moment; the peak is the largest.

    ``forward``: all activations, and the last step's gradients, which the Trainer drops only now. ``backward``: start
    and end. ``extra``: the same of SSIUU's extra pass, which drops no activation. ``regulariser``, ``optimiser``: after
    the backward pass, without activations.
    """
    shards = setup.ranks if setup.sharded else 1
    if setup.rank is None:
        trained, wide = model.parameters, setup.weight
        weights: float = setup.weight * model.parameters
    else:
        trained, wide = model.adapters(setup.rank), 4  # adapters stay in float32
        rest = setup.weight * (model.parameters - model.blocks)
        weights = setup.frozen * model.blocks + rest + wide * trained
    parts, lora = (forget, retain), setup.rank is not None
    activations = sum(activation_bytes(model, part, setup.weight, setup.checkpointing, lora) for part in parts)
    whole = setup.weight * (2 * model.embeddings + 3 * model.block) if setup.sharded and setup.ranks > 1 else 0
    gathered = setup.weight * (model.embeddings + 2 * model.block)  # no gradients yet
    # A block that is computed again is so for all that is in the pass.
    joined = sum if not ssiuu or whole else max
    block = joined(block_bytes(model, part, setup.weight, lora) for part in parts) if setup.checkpointing else 0
    # Gradients of the logits, in float32 and in their own type, which is more of them where there are two.
    logits = max(forget.n_labels, retain.n_labels) * model.vocab_size * (4 if setup.weight == 4 else 6)
    # DDP's buckets: a second copy of the gradients. FSDP2: embeddings, head and two blocks whole, and their gradients.
    buckets = wide * trained if setup.ranks > 1 and not setup.sharded else 0
    states = (weights + setup.optimizer * trained) / shards + buckets
    gradients = wide * trained / shards
    if not ssiuu:
        return {
            "forward": states + gradients + (gathered if whole else 0) + activations,
            "backward": states + whole + max(activations + logits, gradients + block),
            "optimiser": states + gradients,
        }
    anchor, gradient = ANCHOR * trained / shards, GRADIENT * trained / shards
    fresh = 0 if wide == 4 else gradients
    largest = model.embeddings / shards if setup.rank is None and setup.chunk == CHUNK else 0
    chunk = min(trained / shards, max(setup.chunk, largest))
    return {
        "extra": states + anchor + gradients + whole + activations + max(logits, gradient + fresh + block),
        "backward": states + anchor + gradient + whole + max(activations + logits, gradients + block),
        "regulariser": states + anchor + gradients + gradient + CHUNK_BYTES * chunk,
        "optimiser": states + anchor + gradients,
    }


# ---- communication --------------------------------------------------------------------------------------------------


def communicated(model: Model, ssiuu: bool, setup: Setup) -> dict[str, float]:
    """Bytes of the tensors that all ranks together gather or reduce in a step (whole tensors, counted once).

    DDP: gradients, and g in float32. FSDP2: every pass gathers the blocks, forward and backward; the root stays whole
    in between. SSIUU adds a backward pass, before and after which the root is gathered again. Gradients
    are reduced in float32 (:func:`lightning_ssiuu.training.fsdp.shard`).

    Returns:
        ``all_reduce``, ``all_gather``, ``reduce_scatter``; over a ring a rank sends (R − 1)/R of them, of the first
        twice that.
    """
    whole = setup.weight * model.parameters
    if not setup.sharded:
        return {
            "all_reduce": whole + (GRADIENT * model.parameters if ssiuu else 0),
            "all_gather": 0,
            "reduce_scatter": 0,
        }
    blocks = setup.weight * (model.blocks + model.norms)
    root = whole - blocks
    gathered = 3 * blocks + 3 * root if ssiuu else 2 * blocks + root
    return {
        "all_reduce": 0,
        "all_gather": gathered,
        "reduce_scatter": GRADIENT * model.parameters * (2 if ssiuu else 1),
    }
