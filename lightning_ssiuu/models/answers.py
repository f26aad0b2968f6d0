"""What a forward pass says about the answers of a batch: logits where there are labels, and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from lightning_ssiuu.models.architectures import architecture_of
from lightning_ssiuu.models.compiling import CompiledPasses
from lightning_ssiuu.models.logits import LOGIT_BYTES, ChunkedLogits
from lightning_ssiuu.models.packing import Packing, allow_packing, at, longest_packed, register, run_packed, takes_rows
from lightning_ssiuu.utils.distributed import all_ranks, total_over_ranks, world_size
from lightning_ssiuu.utils.errors import UserError

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

#: A part of a batch: ``input_ids``, ``attention_mask`` and ``labels`` ``[B, L]``, ``example_id`` ``[B]``, and what else
#: the data give.
Part = Mapping[str, Tensor]


class AnswerModel(nn.Module):
    """A causal language model that computes what its answers ask for: no padding, and logits only at the labels.

    The tokens of a batch that are inputs to the prediction of an answer stand in one row, in which every sequence
    attends to itself alone (:mod:`lightning_ssiuu.models.packing`). Hidden states are selected before the vocabulary
    projection, whose output would be the largest tensor of a step. It is a module, not a function, so that sharding
    strategies find one root whose ``forward`` they can hook.

    Args:
        hf: The transformers model. Where the head may do more than a projection (soft caps, scales), full logits are
            computed and then selected: for types whose record
            (:class:`~lightning_ssiuu.models.architectures.Architecture`) does not call the head plain, and for models
            whose own logits turn out to be others, which is said in the log. So are models that cannot take sequences
            in one row; they get padded batches.

    Attributes:
        plain_head: Whether logits are computed at the labelled positions alone.
        engine: What generates text instead, of the same weights; None: the model itself.
        packs: Whether sequences go in one row; set it to False to have padded batches.
        logit_bytes: More logits than these, in float32, are computed in pieces (a linear head's alone; see
            :class:`~lightning_ssiuu.models.logits.ChunkedLogits`).
        packing: How the latest forward pass laid its tokens out; None if it was padded.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> model = AnswerModel(load_model("tiny"))
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> labels = torch.tensor([[-100, -100, 7, 8]])
        >>> answers = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        >>> answers.targets.tolist(), answers.sequence_index.tolist()
        ([7, 8], [0, 0])
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.plain_head = _has_plain_head(hf)
        self.packing: Packing | None = None
        if (obstacle := allow_packing(hf)) is not None:
            _tell_padded(hf.config.model_type, obstacle)
        self.packs = obstacle is None
        self.logit_bytes = LOGIT_BYTES
        self._longest = longest_packed(hf.config)
        self._compiled: CompiledPasses | None = None
        self.engine: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()  # unpickled in another process

    def compile_training(self, backend: str) -> None:
        """Compile the passes that are trained through (:class:`~lightning_ssiuu.models.compiling.CompiledPasses`).

        They are padded: rows of ever new lengths would be compiled anew.
        """
        self._compiled = CompiledPasses(self.hf.base_model if self.plain_head else self.hf, backend)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *others: Part, share: bool = False
    ) -> Answers | tuple[Answers, ...]:
        """The :class:`Answers` at the N labelled positions of ``[B, L]`` tokens (labels: −100 elsewhere).

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]``.
            *others: Further parts of the same pass, each of its own shape; the answers of all are then a tuple.
            share: Compute once what sequences that follow each other begin with, as the options of a question do.
        """
        parts = ({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}, *others)
        self.packing = None
        if self.packs and self._compiled is None and takes_rows(self.hf):
            ids, mask, marked = (
                _below_each_other([part[name] for part in parts], fill)
                for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
            )
            needed = input_positions(mask, marked)
            longest = needed.shape[1] if self._longest is None else self._longest
            fits = (needed[:, 1:] <= needed[:, :-1]).all() & needed.any() & (needed.sum(1).max() <= longest)
            if others and _is_cut(self):  # ranks gather the weights together, pass by pass
                fits = all_ranks(fits)
            if fits:
                self.packing = Packing.of(needed, ids if share and takes_rows(self.hf, shared=True) else None)
                output = run_packed(self.hf.base_model if self.plain_head else self.hf, self.hf, self.packing, ids)
                above = [0, *accumulate(len(part["labels"]) for part in parts)]
                found = tuple(self._read(output, part["labels"], n) for part, n in zip(parts, above, strict=False))
                return found if others else found[0]
        if others:  # each in a pass of its own
            return tuple(self(part["input_ids"], part["attention_mask"], part["labels"]) for part in parts)
        module = self._compiled or (self.hf.base_model if self.plain_head else self.hf)
        return self._read(module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False), labels)

    def _read(self, output: Any, labels: Tensor, above: int = 0) -> Answers:
        # The token at position k is predicted from position k − 1.
        labelled = labels[:, 1:] != -100
        sequence_index, position = labelled.nonzero(as_tuple=True)
        targets = labels[:, 1:][labelled]
        values = output.last_hidden_state if self.plain_head else output.logits
        values = at(values, self.packing, sequence_index + above, position)
        if not self.plain_head:
            return Answers(values, targets, sequence_index, labels.shape[0])
        head: Any = self.hf.get_output_embeddings()
        chunked = ChunkedLogits.fits(head, len(targets), self.logit_bytes)
        scores = ChunkedLogits(values, head, targets, self.logit_bytes) if chunked else head(values)
        return Answers(scores, targets, sequence_index, labels.shape[0])

    def generate(self, **kwargs: Any) -> Tensor:
        """``transformers``' ``generate`` with these options alone, whatever is stored with the checkpoint.

        Sharded weights are gathered for this module's methods alone.
        """
        with nothing_stored(self.hf):
            return self.hf.generate(**kwargs)


def _is_cut(model: nn.Module) -> bool:
    return world_size() > 1 and any(hasattr(parameter, "to_local") for parameter in model.parameters())


@cache
def _tell_padded(model_type: str, obstacle: str) -> None:
    rank_zero_info(f"{model_type}: batches are padded, not packed into one row: {obstacle}.")


def _below_each_other(values: Sequence[Tensor], fill: int) -> Tensor:
    if len(values) == 1:
        return values[0]
    width = max(value.shape[1] for value in values)
    return torch.cat([F.pad(value, (0, width - value.shape[1]), value=fill) for value in values])


@contextmanager
def nothing_stored(hf: PreTrainedModel) -> Iterator[None]:
    """Inside, generation settings stored with a checkpoint (penalties, beams, sampling) do not act."""
    stored: Any = hf.generation_config  # generate fills up from it what it is not given
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = stored


@dataclass
class _Hidden(BaseModelOutput):
    """What a base model gives; caches, attentions and routers are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def own_logits(hf: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits ``[..., V]`` that a model's own forward pass makes of final hidden states ``[..., H]``."""
    base: Any = hf.base_model
    states = hidden.reshape(1, -1, hidden.shape[-1])
    forward = vars(base).get("forward")
    base.forward = lambda *_, **__: _Hidden(last_hidden_state=states)
    try:
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        logits = hf(input_ids=ids, use_cache=False).logits
    finally:
        del base.forward
        if forward is not None:
            base.forward = forward
    return logits.view(*hidden.shape[:-1], -1)


def _has_plain_head(hf: Any) -> bool:
    architecture = architecture_of(hf)
    if architecture is None or not architecture.plain_head:
        return False
    weight = hf.get_output_embeddings().weight
    if type(weight) is not nn.Parameter or weight.is_meta:  # no values, or not all of them
        return True
    if hf.base_model is not hf and _is_own(hf, weight):
        return True
    rank_zero_info(f"{hf.config.model_type}: the model's own logits are not its unembedding's alone; all are computed.")
    return False


@torch.no_grad()
def _is_own(hf: Any, weight: Tensor) -> bool:
    head = hf.get_output_embeddings()
    hidden = torch.arange(2 * weight.shape[1], device=weight.device).view(2, -1).sin()
    peaks = head(hidden.to(weight.dtype)).float().abs().amax(1, keepdim=True)
    if not (peaks.isfinite() & (peaks > 0)).all():  # nothing to compare
        return False
    # A cap shows in large logits, whatever is added to them in small ones.
    hidden = (hidden / peaks * peaks.new_tensor([[1.0], [1e4]])).to(weight.dtype)
    alone, own = head(hidden), own_logits(hf, hidden)
    return alone.shape == own.shape and torch.allclose(alone.double(), own.double(), 1e-6, 1e-6)


def answer_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each answer token, ``[N]`` nats, in float32 or wider whatever the logits' type."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")


def sequence_sums(values: Tensor, sequence_index: Tensor, n_sequences: int) -> Tensor:
    """Sum per-token values ``[N]`` within each sequence: ``[B]``, zero for a sequence without labels."""
    return values.new_zeros(n_sequences).index_add(0, sequence_index, values)


@dataclass(frozen=True)
class Answers:
    """What a forward pass says about the answers of a batch; derived values are computed once, on demand.

    Args:
        scores: The logits ``[N, V]`` at the labelled positions only, or what makes them in pieces.
        targets: ``[N]`` the answer tokens.
        sequence_index: ``[N]`` the row of the batch each belongs to, sorted.
        n_sequences: B.
    """

    scores: Tensor | ChunkedLogits
    targets: Tensor
    sequence_index: Tensor
    n_sequences: int

    def only(self, kept: Tensor) -> Answers:
        """The answers of the sequences ``kept`` (``[B]`` bool) alone."""
        of_token = kept[self.sequence_index]
        return self._at(of_token, (kept.long().cumsum(0) - 1)[self.sequence_index[of_token]], int(kept.sum()))

    def _at(self, tokens: Tensor, index: Tensor, n_sequences: int) -> Answers:
        targets, scores = self.targets[tokens], self.scores
        if isinstance(scores, ChunkedLogits):
            scores = replace(scores, hidden=scores.hidden[tokens], targets=targets)
        else:
            scores = scores[tokens]
        return Answers(scores, targets, index, n_sequences)

    def without_end(self, ends: Sequence[int]) -> Answers:
        """The answers without the last label of each that ends in one of ``ends``; where that is all, none is left."""
        kept = ~torch.isin(self.targets, self.targets.new_tensor(list(ends)))
        kept[:-1] |= self.sequence_index[1:] == self.sequence_index[:-1]
        return self._at(kept, self.sequence_index[kept], self.n_sequences)

    @cached_property
    def logits(self) -> Tensor:
        """``[N, V]``; whoever asks for it holds them all."""
        return self.scores.whole() if isinstance(self.scores, ChunkedLogits) else self.scores

    @cached_property
    def token_logps(self) -> Tensor:
        """``[N]`` log-probabilities of the answer tokens (nats)."""
        if isinstance(self.scores, ChunkedLogits):
            return self.scores.token_logps
        return answer_token_logps(self.scores, self.targets)

    @property
    def roots(self) -> set[Any]:
        """Nodes of the graph that all else is computed from: of the logits, or of what was taken instead of them."""
        if not isinstance(self.scores, ChunkedLogits):
            return {self.scores.grad_fn}
        return {self.scores.token_logps.grad_fn} | ({self.logits.grad_fn} if "logits" in vars(self) else set())

    @property
    def peaks(self) -> Tensor:
        """``[N]`` the largest logit at each position."""
        return self.scores.peaks if isinstance(self.scores, ChunkedLogits) else self.scores.detach().amax(-1)

    @cached_property
    def logps(self) -> Tensor:
        """``[B]`` log P(y|x), the sum over the answer's tokens (nats)."""
        return sequence_sums(self.token_logps, self.sequence_index, self.n_sequences)

    @cached_property
    def lengths(self) -> Tensor:
        """``[B]`` number of answer tokens."""
        ones = torch.ones_like(self.token_logps.detach())
        return sequence_sums(ones, self.sequence_index, self.n_sequences)

    @property
    def mean_logps(self) -> Tensor:
        """``[B]`` mean log-probability per answer token (nats)."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def token_correct(self) -> Tensor:
        """``[N]`` whether greedy decoding picks the answer's token there."""
        best = self.scores.best if isinstance(self.scores, ChunkedLogits) else self.scores.argmax(-1)
        return best == self.targets


Reduction = Literal["sequence", "token"]


def mean_over_answers(
    values: Tensor, answers: Answers, counted: Tensor | None = None, reduction: Reduction = "sequence"
) -> Tensor:
    """Mean of ``values [N]`` over sequences of each answer's mean, or over all tokens alike (``"token"``).

    Only the tokens ``counted`` (``[N]`` bool; None: all) take part; a sequence with none of them adds 0 to the sum.
    """
    lengths = answers.lengths
    if counted is not None:
        values = values.where(counted, 0.0)
        lengths = sequence_sums(counted.to(lengths.dtype), answers.sequence_index, answers.n_sequences)
    return mean_of_sums(sequence_sums(values, answers.sequence_index, answers.n_sequences), lengths, reduction)


def mean_of_sums(sums: Tensor, lengths: Tensor, reduction: Reduction = "sequence") -> Tensor:
    """The mean of sequences' ``sums / lengths`` (``[B]`` each), or with ``"token"`` the sum of all over all lengths.

    The latter is over all ranks' tokens: a rank gets its sum over the mean rank's number of tokens, and the mean over
    ranks, as gradients and logged losses are, is the one over tokens. Each rank must call it.

    Example:
        >>> sums, lengths = torch.tensor([-6.0, -1.0]), torch.tensor([3.0, 1.0])
        >>> mean_of_sums(sums, lengths).item(), mean_of_sums(sums, lengths, "token").item()
        (-1.5, -1.75)
    """
    if reduction == "token":
        return sums.sum() * world_size() / total_over_ranks(lengths.sum()).clamp(min=1)
    return (sums / lengths.clamp(min=1)).mean()


Target = Literal["sequence", "length_normalised", "log_probability"]
TARGETS: tuple[Target, ...] = get_args(Target)


def target_logps(answers: Answers, target: Target) -> Tensor:
    """Log of the probability that is attributed: ``[B]`` values in nats.

    ``"sequence"`` is P(y|x), the paper's; ``"length_normalised"`` P(y|x)^{1/T}, T the number of answer tokens,
    comparable between lengths; ``"log_probability"`` is log P(y|x) / T.

    Every attribution of P carries the factor P. Where unlearning has pushed P to almost nothing, all attributions
    are almost nothing, negative ones included: D⁻ then vanishes although nothing was erased. ``"log_probability"`` has
    no such factor, but its gradient grows as P falls, also for a model that never knew the answer.

    Raises:
        UserError: If the target is unknown.
    """
    if target not in TARGETS:
        raise UserError("target", target, f"one of {list(TARGETS)}")
    return answers.logps if target == "sequence" else answers.mean_logps


def input_positions(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Which tokens are inputs to the prediction of some answer token: ``[B, L]`` bool."""
    answer_follows = (labels[:, 1:] != -100).flip(1).cumsum(1).flip(1) > 0
    inside = torch.cat([answer_follows, torch.zeros_like(answer_follows[:, :1])], dim=1)
    return inside & attention_mask.bool()
