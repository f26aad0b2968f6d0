"""KLUE: gradient difference that updates only the feed-forward neurons which carry the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.datamodules.pairs import asked, batch_of
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part, Reduction, mean_of_sums, sequence_sums
from lightning_ssiuu.models.architectures import feed_forward_sites
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import gradient_ascent
from lightning_ssiuu.training.shards import local, reshard, train_only
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel


def unforgotten_ascent(answers: Answers, only_unforgotten: bool = True, reduction: Reduction = "sequence") -> Tensor:
    """:func:`gradient_ascent` over the answers that greedy decoding still gives token by token; others count 0.

    The mean is over all sequences (or tokens), so that the fewer are left the smaller it is, and ranks with equal
    shares average right. Source: KLUE's choice of unforgotten samples (Yang et al., arXiv 2502.19207).
    """
    if not only_unforgotten:
        return gradient_ascent(answers, reduction)
    wrong = sequence_sums((~answers.token_correct).float(), answers.sequence_index, answers.n_sequences)
    return mean_of_sums(answers.logps.where(wrong == 0, 0.0), answers.lengths, reduction)


class KLUE(UnlearningModule):
    """Knowledge-localised unlearning (Yang et al., FaithUn, EMNLP 2025, arXiv 2502.19207).

    Before the first step the neurons are chosen on the whole forget set
    (:func:`~lightning_ssiuu.objectives.klue.knowledge_neurons`); then gradient difference moves their rows and columns
    and nothing else: all other weights keep every bit, whatever the optimiser does (decay, momentum). The forget loss
    leaves out answers the model no longer gives.

    Deviations: the paper's code is not public. Mismatched questions are those of other forget examples; neurons are
    chosen once for the whole forget set; an answer counts as forgotten once greedy decoding, given the answer before
    it, misses a token.

    A step takes a second copy of the feed-forward weights: they are put back where no neuron was chosen.

    Args:
        share: Of the feed-forward neurons that train, in (0, 1].
        regularization: α ≥ 0 of the superficial-knowledge regularisation.
        mismatched: N ≥ 1, other questions per answer.
        only_unforgotten: Leave answers out of the forget loss once they are forgotten.
        seed: Of the choice of other questions.

    Raises:
        UserError: If weights are frozen (``lora``).

    Example:
        >>> module = KLUE(share=0.05)
        >>> module.configure_model()
        >>> [name for name, p in module.model.named_parameters() if p.requires_grad][:2]
        ['hf.model.layers.0.mlp.gate_proj.weight', 'hf.model.layers.0.mlp.up_proj.weight']
    """

    can_be_backbone = False
    state_attributes = ("neurons",)  # a resumed run's weights would choose others

    def __init__(
        self,
        share: float = 0.1,
        regularization: float = 10.0,
        mismatched: int = 5,
        only_unforgotten: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < share <= 1:
            raise UserError("share", share, "a share in (0, 1]")
        check_number("regularization", regularization)
        check_at_least("mismatched", mismatched, 1)
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: a neuron's rows and columns are the weights' own, not adapters'")
        self.share, self.regularization, self.mismatched = share, regularization, mismatched
        self.only_unforgotten, self.seed = only_unforgotten, seed
        self.neurons: dict[int, Tensor] = {}  # by block, which train

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().adopt(model, tokenizer)
        train_only(model.hf, neuron_weights(model.hf))

    def prepare(self) -> None:
        # Every rank looks at all examples, so that all choose alike.
        options = self.share, self.regularization, self.mismatched, self.seed, self.tokenizer.pad_token_id
        with untouched(self.model), self.trainer.precision_plugin.forward_context():
            self.neurons = knowledge_neurons(self.model, self.training_parts("forget"), *options)

    def forget_loss(self, batch: Part) -> Tensor:
        return unforgotten_ascent(self.answers(batch), self.only_unforgotten, self.reduction)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        # After the regulariser: no gradient outside, for clipping and the optimiser's averages.
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                local(parameter.grad).mul_(mask)

    @torch.no_grad()
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        reshard(self.model)
        before = [local(parameter).clone() for parameter, _ in self._masked()]
        with torch.enable_grad():
            super().optimizer_step(*args, **kwargs)
        # Put back what is outside: weight decay moves weights without a gradient.
        for (parameter, mask), old in zip(self._masked(), before, strict=True):
            own = local(parameter)
            own.copy_(torch.where(mask, own, old))

    def _masked(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        parameters, masked = dict(self.model.hf.named_parameters()), []
        for name, (layer, dimension) in neuron_weights(self.model.hf).items():
            parameter = parameters[name]
            size = parameter.shape[dimension]
            mask = self.neurons.get(layer, torch.ones(size, dtype=torch.bool))  # all where nothing was chosen yet
            mask = mask.repeat(size // len(mask))  # gate and up of a fused projection are its halves
            masked.append((parameter, local_mask(mask, parameter, dimension)))
        return masked


def neuron_weights(hf: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The weights that belong to one feed-forward neuron each: by name the block, and the dimension of the neurons.

    Neuron j of a block is the input j of its down projection: it owns row j of the gate and up projections, with their
    biases, and column j of the down projection. (GPT-2 stores matrices the other way round.) The down projection's
    bias belongs to none.
    """
    found = {}
    for site in feed_forward_sites(hf):
        module = hf.get_submodule(site.module_name)
        comes_in = site.kind == "mlp_down"
        found[f"{site.module_name}.weight"] = site.layer, int(comes_in != isinstance(module, Conv1D))
        if not comes_in and getattr(module, "bias", None) is not None:
            found[f"{site.module_name}.bias"] = site.layer, 0
    return found


def knowledge_neurons(
    model: AnswerModel,
    parts: Iterable[Part],
    share: float,
    regularization: float,
    mismatched: int,
    seed: int,
    pad_token_id: int = 0,
) -> dict[int, Tensor]:
    """The feed-forward neurons most attributed to answers, less what the answers get without their questions.

    The score of a neuron is the mean over examples of ``max_k A[i, k]`` (activation × gradient of P(y|x), arXiv
    2509.22263, Eq. 1) minus ``regularization`` (α) times the same mean over pairs of a question with an answer of
    another: knowledge of the answer as such, "superficial" in FaithUn's words (KLUE, Yang et al., arXiv 2502.19207).
    For gated networks the attribution of the up projection's output, which is used here, equals that of the neuron
    itself, as one is a multiple of the other. ``share`` is of the neurons of all blocks together; at least one is
    chosen. Returns by block ``[width]`` bool on the CPU; ``.grad`` fields stay as they are.
    """
    parts = list(parts)
    sites = [site for site in feed_forward_sites(model.hf) if site.kind == "mlp_up"]
    scores = neuron_attribution(model, parts, sites).mean_maximum
    if regularization > 0 and (wrong := list(mismatched_parts(parts, mismatched, seed, pad_token_id))):
        scores = scores - regularization * neuron_attribution(model, wrong, sites).mean_maximum
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.topk(max(1, round(share * len(scores)))).indices] = True
    return dict(zip([s.layer for s in sites], chosen.split([s.width for s in sites]), strict=True))


def mismatched_parts(parts: Sequence[Part], count: int, seed: int, pad_token_id: int = 0) -> Iterator[Part]:
    """Every answer after ``count`` questions of examples with other answers, drawn without replacement, or fewer."""
    rows = [(question, answer) for part in parts for question, answer in asked(part) if answer]
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for question, answer in rows:
        order = torch.randperm(len(rows), generator=generator).tolist()
        others = [rows[i][0] for i in order if rows[i][1] != answer and rows[i][0] != question]
        pairs += [(other, answer) for other in others[:count]]
    size = max((len(part["input_ids"]) for part in parts), default=1)
    for start in range(0, len(pairs), size):
        yield batch_of(pairs[start : start + size], pad_token_id)


def local_mask(chosen: Tensor, parameter: nn.Parameter, dimension: int) -> Tensor:
    """Which entries of this rank's part of a weight belong to the ``chosen`` ``[width]`` neurons, broadcastable to it.

    ``dimension`` is the weight's that counts neurons.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    chosen = chosen.to(parameter.device)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = DTensor.from_local(chosen, mesh, [Replicate()] * mesh.ndim)
        # The vector's only dimension is 0; it is cut into the pieces that the weight is cut into along its own.
        cut = [Shard(0) if place.is_shard(dimension) else Replicate() for place in parameter.placements]
        chosen = whole.redistribute(mesh, cut).to_local()
    shape = [1] * parameter.ndim
    shape[dimension] = len(chosen)
    return chosen.view(shape)
