"""Per-sequence weights on a gradient, in the backward pass that trains: ``Σ_b w_b ∂log P_b/∂φ`` beside ``∂L/∂φ``.

Behind every layer with trained weights stands an identity (a tap) that sees, in the backward pass, the gradient
δ of the layer's output. Where the loss depends on the forget part through its sequences' log-probabilities alone, the
rows of δ that belong to sequence b are ``c_b ∂log P_b/∂out`` with ``c_b = ∂L/∂log P_b``; scaled by ``w_b / c_b`` and
multiplied with the layer's input they make the second weight gradient. The first one takes its own way through the
layer, unchanged to the bit. c_b is read in the backward pass itself, so that loss scaling and accumulation cancel.

What is assumed is checked on the graph of every step (:meth:`SinglePass.arm`): that the loss reaches the forward pass
through log P alone, and that every use of a trained weight lies within a layer whose rule is known
(:data:`lightning_ssiuu.training.layer_gradients.LAYERS`) and whose rows of different sequences do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.models.answers import Answers
from lightning_ssiuu.models.logits import ChunkedLogits
from lightning_ssiuu.models.packing import Packing
from lightning_ssiuu.models.quantization import is_quantized
from lightning_ssiuu.training.fsdp import is_sharded
from lightning_ssiuu.training.layer_gradients import Rule, Sums, rule_of

#: Below, a sequence's share of the loss is lost in rounding (nats; the loss is of order 1).
_SMALLEST = 1e-12
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class NotExact(Exception):  # noqa: N818 - no mistake of anybody's
    """A single pass would not give what two give; the message says why, ``is_momentary`` if the next may."""

    def __init__(self, reason: str, is_momentary: bool = False) -> None:
        super().__init__(reason)
        self.is_momentary = is_momentary


def obstacle(model: nn.Module, parameters: Collection[nn.Parameter]) -> str | None:
    """Why a model's gradients cannot be taken in a single pass, as far as its layers tell; None if they can."""
    if is_sharded(model):
        return "weights are cut over the ranks"
    config = getattr(getattr(model, "hf", model), "config", None)
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return "a mixture of experts mixes the sequences of a batch"
    wanted = {id(p) for p in parameters}
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            return f"{type(layer).__name__} mixes the sequences of a batch"
        if is_quantized(layer):
            return "weights are quantised"
        if hasattr(layer, "_orig_mod"):
            return "the model is compiled"
        if any(id(p) in wanted for p in layer.parameters(recurse=False)) and rule_of(layer) is None:
            return f"no rule for trained weights of {type(layer).__name__}"
    return None


class _Forward:
    """A forward pass on the forget part, and later what its backward pass is to add where."""

    def __init__(self, n_sequences: int) -> None:
        self.n_sequences = n_sequences
        self.packing: Packing | None = None
        self.n_tokens = 0  # of a packed row, those that are the forget part's; they come first
        self.others: tuple[Answers, ...] = ()  # of the other parts of the pass
        self.taps: dict[Any, Any] = {}  # graph node of a tap: of the layer's input
        self.is_read = False  # whether the unembedding was called at its labels
        self.problem: str | None = None
        self.answers: Answers | None = None
        self.sums: Sums | None = None
        self.weights: Tensor | None = None  # [B, 1] w_b / c_b, in the backward pass; [1, n_tokens] in a packed row
        self.by_label: Tensor | None = None  # [N] the same for the labelled positions
        self.n_expected = self.n_seen = 0

    def add(self, rule: Rule, layer: nn.Module, x: Tensor, delta: Tensor, is_head: bool) -> None:
        if self.weights is None or self.by_label is None or self.sums is None:
            return
        self.n_seen += 1
        if self.packing is not None and not is_head:
            x, delta = x[:, : self.n_tokens], delta[:, : self.n_tokens]
        rule(layer, x, delta, self.by_label if is_head else self.weights, self.sums)

    def begin(self, packing: Packing | None) -> None:
        if packing is not None and self.packing is None:
            self.packing = packing
            self.n_tokens = int((packing.sequences < self.n_sequences).sum())

    def watch_chunks(self, scores: ChunkedLogits, head: nn.Module, wanted: Collection[int]) -> None:
        """Have a head that is called in pieces, and not as a module, act like one that is tapped."""
        rule, node = rule_of(head), scores.token_logps.grad_fn
        if node is None or rule is None or all(id(p) not in wanted for p in head.parameters()):
            return
        self.taps[node] = scores.hidden.grad_fn

        def add(x: Tensor, delta: Tensor, rows: slice) -> None:
            if self.by_label is not None and self.sums is not None:
                self.n_seen += rows.start == 0
                rule(head, x, delta, self.by_label[rows], self.sums)

        scores.show_to(add)

    def set_weights(self, by_sequence: Tensor, sequence_index: Tensor) -> None:
        self.by_label = by_sequence[sequence_index]
        if self.packing is None:
            self.weights = by_sequence.unsqueeze(1)
        else:
            self.weights = by_sequence[self.packing.sequences[: self.n_tokens]].unsqueeze(0)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, rule: Rule, layer: nn.Module, forward: _Forward | None, is_head: bool
    ) -> Tensor:
        ctx.save_for_backward(x)  # which the layer keeps as well, so that it costs no memory
        ctx.rule, ctx.layer, ctx.of, ctx.is_head = rule, layer, forward, is_head
        kind = output.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # One row for all sequences (positions) is repeated, or the backward pass would only see their sum.
        padded = forward is not None and forward.packing is None
        ctx.repeated = forward is not None and padded and len(output) == 1 < forward.n_sequences and not is_head
        if ctx.repeated and forward is not None:
            return output.detach().expand(forward.n_sequences, *output.shape[1:]).clone()
        return output.detach()  # no view of the input, so that models may change it in place

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        (delta,) = deltas
        if ctx.of is not None and ctx.of.weights is not None:
            kind, dtype, enabled = ctx.autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
                ctx.of.add(ctx.rule, ctx.layer, ctx.saved_tensors[0], delta, ctx.is_head)
        if ctx.repeated:
            delta = delta.sum(0, keepdim=True)
        return delta, None, None, None, None, None


class SinglePass:
    """Takes ``Σ_b w_b ∂log P_b/∂φ`` of a forward pass in the backward pass of the loss; one micro-batch at a time."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._known: list[_Forward] = []
        self._now: _Forward | None = None
        self._recomputes = False

    @property
    def watching(self) -> bool:
        """Whether forward passes are being watched."""
        return bool(self._handles)

    def watch(self, model: nn.Module, part: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Tap the forward passes on ``part`` (known by its ``input_ids``) from now to the end of the backward pass.

        Raises:
            NotExact: If the layers do not allow it.
        """
        self.release()
        if (reason := obstacle(model, parameters)) is not None:
            raise NotExact(reason)
        hf: Any = getattr(model, "hf", None)
        head = hf.get_output_embeddings() if hf is not None else None
        wanted = {id(p) for p in parameters}
        ids = part["input_ids"]

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            if (args[0] if args else kwargs.get("input_ids")) is ids:
                self._now = _Forward(len(ids))
                self._known.append(self._now)

        def end(_: nn.Module, __: Any, output: Any) -> None:
            if self._now is not None:
                first, *others = output if isinstance(output, tuple) else (output,)
                self._now.answers, self._now.others = first, tuple(others)
                if head is not None and isinstance(first.scores, ChunkedLogits):
                    self._now.watch_chunks(first.scores, head, wanted)
                self._now = None

        self._handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
        for layer in model.modules():
            # What is recomputed in the backward pass has to save what was saved, of whatever part it is.
            self._recomputes |= bool(getattr(layer, "gradient_checkpointing", False))
            if any(id(p) in wanted for p in layer.parameters(recurse=False)):
                hook = self._hook(model, layer, layer is head)
                # First of its hooks: others may change the output.
                self._handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def _hook(self, model: Any, layer: nn.Module, is_head: bool) -> Callable[[nn.Module, Any, Any, Any], Any]:
        if (rule := rule_of(layer)) is None:
            raise NotExact(f"no rule for trained weights of {type(layer).__name__}")

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            now = self._now
            if now is None and not self._recomputes:
                return None
            by_label = is_head and isinstance(output, Tensor) and output.dim() == 2
            if now is not None:
                if by_label and now.is_read:
                    return None  # the labels of another part
                now.is_read |= by_label
                now.begin(model.packing)
                now.problem = now.problem or _problem(layer, args, kwargs, output, by_label, now)
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return None
            if not output.requires_grad:
                return None
            tapped = _Tap.apply(output, args[0].detach(), rule, layer, now, by_label)
            if now is not None:
                now.taps[tapped.grad_fn] = args[0].grad_fn
            return tapped

        return hook

    def arm(
        self,
        answers: Answers,
        weights: Tensor,
        loss: Tensor,
        parameters: Sequence[nn.Parameter],
        into: list[Tensor | None],
    ) -> None:
        """Have the backward pass of ``loss``, which comes next, add ``Σ_b weights_b ∂log P_b/∂φ`` to ``into``.

        ``answers`` are those of a watched forward pass, ``weights [B]`` constants, ``into`` as for :class:`Sums`.

        Raises:
            NotExact: If the loss depends on these answers in another way than through ``answers.logps``, or not at
                all, or not on every sequence; if a weight is used outside its layer. Nothing is armed then.
        """
        try:
            forward = next((known for known in self._known if known.answers is answers), None)
            if forward is None:
                raise NotExact("the forget part's forward pass was not watched")
            if forward.problem is not None:
                raise NotExact(forward.problem)
            taps, forward.taps = forward.taps, {}  # they know of each other: the graph would outlive the step
            logps = answers.logps
            _check_loss(loss, logps, taps, {node for other in forward.others for node in other.roots})
            forward.n_expected = _check_weights(logps, taps, parameters)
            (slope,) = torch.autograd.grad(loss, logps, retain_graph=True)
            if not slope.abs().min().item() >= _SMALLEST:
                raise NotExact("the loss does not depend on every forget sequence of a batch", is_momentary=True)
            forward.sums = Sums(parameters, into)
            forward.others = ()
            index = answers.sequence_index  # not the answers: their hook would keep them alive
            is_real = False  # other regularisers may differentiate log P before the loss is

            def begin(_: Tensor) -> None:
                nonlocal is_real
                is_real = True

            def take(gradient: Tensor) -> None:
                if is_real:
                    forward.set_weights(weights / gradient, index)

            loss.register_hook(begin)
            logps.register_hook(take)
        finally:
            # Also where nothing is armed: what is recomputed on the way back has to be as it was.
            if loss.requires_grad:
                loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self.release))

    def release(self) -> None:
        """Forget what was watched, and leave the model as it was before.

        Raises:
            RuntimeError: If a backward pass went past layers that it had to pass.
        """
        done, self._known, self._now, self._recomputes = self._known, [], None, False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for forward in done:
            forward.taps = {}
            if forward.weights is not None and forward.n_seen != forward.n_expected:
                seen = f"{forward.n_seen} of {forward.n_expected}"
                raise RuntimeError(f"a single pass saw {seen} layers; take passes: two")
            forward.weights = forward.by_label = forward.sums = forward.answers = None
            forward.others = ()


def _problem(layer: nn.Module, args: Any, kwargs: Any, output: Any, by_label: bool, forward: _Forward) -> str | None:
    """Why a call of a layer has no output whose rows are those of the sequences; None if it has."""
    name = type(layer).__name__
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return f"{name} is called with more than its input"
    if not output.requires_grad:
        return f"{name} is run without a graph"
    if by_label:
        return None
    if forward.packing is not None:
        fits = output.shape[:2] == (1, len(forward.packing.flat))
    else:
        is_position = isinstance(layer, nn.Embedding) and len(output) == 1
        fits = len(output) == forward.n_sequences or is_position
    if output.dim() < 3 or not fits:
        return f"{name} gives {list(output.shape)}, whose rows are no sequences"
    return None


def _nodes(start: Any, ends: Collection[Any], inputs: Mapping[Any, Any]) -> Iterator[Any]:
    """Nodes of a graph from ``start`` on, not beyond ``ends``, and from a key of ``inputs`` straight to its value."""
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        yield node
        if node in ends:
            continue
        following = [inputs[node]] if node in inputs else [after for after, _ in node.next_functions]
        for after in following:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def _check_loss(loss: Tensor, logps: Tensor, taps: Mapping[Any, Any], others: Collection[Any]) -> None:
    # Beyond the logits of another part of the same pass are that part's rows alone.
    depends = False
    for node in _nodes(loss.grad_fn, {logps.grad_fn, *others}, {}) if loss.grad_fn is not None else ():
        depends |= node is logps.grad_fn
        if node in taps:
            raise NotExact("the loss is no function of the forget answers' log-probabilities alone")
    if not depends:
        raise NotExact("the loss does not depend on the log-probabilities of the forget answers")


def _check_weights(logps: Tensor, taps: Mapping[Any, Any], parameters: Sequence[nn.Parameter]) -> int:
    """How many taps the gradient of log P passes."""
    wanted, n_passed = {id(p) for p in parameters}, 0
    for node in _nodes(logps.grad_fn, (), taps):
        n_passed += node in taps
        if id(getattr(node, "variable", None)) in wanted:
            raise NotExact("a trained weight is used outside its own layer")
    return n_passed
