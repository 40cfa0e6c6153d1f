"""A causal model in two parts: its body, up to the last hidden states, and the tail that makes logits of them.

The tail is the model's own forward pass with its body's output put in: whatever a model does to its logits (a scale, a
soft cap) is done, of as many tokens at a time as fit into a bounded number of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gnomon.errors import InvalidRequest

MAX_LOGITS: Final = 1 << 22
"""Of one run that are held at a time; three runs and their probabilities make a dozen such tensors."""
_divisible: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Of each model, once that was tried."""


class Tail:
    """A causal language model, run in two parts: contexts to last hidden states, and those to logits.

    Of a model that cannot be divided, which is tried once, what is called last hidden states are its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        body = getattr(model, "base_model", model)
        self._body: nn.Module = body if isinstance(body, nn.Module) else model
        self._output: Any = None
        """What the body gave last, whose form the tail is given again."""
        if model not in _divisible:
            _divisible[model] = self._body is not model and self._is_divisible()

    @property
    def is_divided(self) -> bool:
        """Whether memory is bounded whatever the vocabulary; else contexts should be run one at a time."""
        return _divisible[self.model]

    def hidden(self, contexts: Tensor) -> Tensor:
        """Last hidden states (n, length, d) of contexts (n, length), where -1 is padding."""
        mask = (contexts >= 0).long()
        arguments = {"input_ids": contexts.clamp_min(0), "attention_mask": mask, "use_cache": False}
        if not self.is_divided:
            whole: Tensor = self.model(**arguments).logits
            return whole
        self._output = self._body(**arguments)
        return first_of(self._output)

    def logits(self, hidden: list[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Logits (m, vocabulary) of parts of each of the runs' last hidden states (n, d), and which part it is."""
        start, step = 0, 1
        while start < len(hidden[0]):
            part = slice(start, start + step)
            logits = [self._logits(run[part]) if self.is_divided else run[part] for run in hidden]
            yield part, logits
            start += step
            step = max(1, MAX_LOGITS // logits[0].shape[-1])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (m, vocabulary) of last hidden states (m, d)."""
        output = self._output

        def given(*_args: Any, **_kwargs: Any) -> Any:
            return _with_last_hidden(output, hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with replaced_forward(self._body, given):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    def _is_divisible(self) -> bool:
        """Whether two parts make what the whole makes of three tokens."""
        device = next(self.model.parameters()).device
        ids = torch.arange(1, 4, device=device)[None]
        whole = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        if bool(whole.isnan().any()):
            raise InvalidRequest(
                f"the model gives logits that are no numbers ({int(whole.isnan().sum())} of {whole.numel()} for three "
                "tokens), so no cross-entropy can be measured; mend its lm_head, or set evaluation.ce to false",
                code="non_finite",
            )
        _divisible[self.model] = True
        try:
            parts = self._logits(self.hidden(ids)[0])
        except Exception:
            return False
        scale = float(whole[whole.isfinite()].abs().amax()) if bool(whole.isfinite().any()) else 0.0
        return parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-3, atol=1e-5 * scale)


def _with_last_hidden(output: Any, hidden: Tensor) -> Any:
    """The body's output with other last hidden states, and without what belongs to other tokens."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(last_hidden_state=hidden)


def first_of(output: Any) -> Tensor:
    """The hidden states of a module's output: a tensor, or the first of several."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Have a forward hook on a module for a while."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have another forward method on one module for a while."""
    own = vars(module)
    before = own.get("forward")  # accelerate's hooks leave one, which must be there again afterwards
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before
