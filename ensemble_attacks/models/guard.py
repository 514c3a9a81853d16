"""Provide the door through which every tool of this package goes to anybody's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ensemble_attacks.models.ask import check_alone, check_drawn
from ensemble_attacks.models.preserve import differentiable, evaluating, preserved, private_random_state


@contextmanager
def guarded(*models: nn.Module, seed: int = 0, evaluate: bool = True) -> Iterator[None]:
    """Let models be asked whatever a tool needs to know, and leave all as it was found afterwards, whatever happened.

    What it promises, and with it attacks, judge, hosts, diagnostics and evaluation:

    - Within, the models are in eval mode (``evaluate``), but for what is meant to be active in it (`evaluating`).
    - Their randomness, and that of the process (torch's, CUDA's, numpy's, Python's), starts at ``seed``: the same call gives
      the same result.
    - Gradients can be had, whatever mode the caller is in, ``torch.inference_mode`` included.
    - Afterwards the training flag of every single module, every buffer, the parameters' gradients, and every random
      generator, the models' own included, are as they were; also after an exception or an interrupt.
    - A model whose forward waits for other processes, which may ask for fewer passes, is not asked at all (`check_alone`),
      nor one that draws members with numbers that are not probabilities (`check_drawn`).

    `ask` checks what goes into a model and what comes back, and `look` decides what is seen of it.
    """
    for model in models:
        check_alone(model)
        check_drawn(model)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(preserved(model))
        stack.enter_context(private_random_state(seed, *models))
        stack.enter_context(differentiable())
        if evaluate:
            for model in models:
                evaluating(model)
        yield
