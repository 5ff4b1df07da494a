"""Many forward passes of one model at once, each stopping where the others must catch up.

A pass is a greenlet: code of the model that runs until it calls a module that is *served*, and goes
on with the output that it is handed. All passes reach the same module before any goes on, so its
weights have to be there once, however many batches and variants of the model there are; nothing
is known of the model's own code, and one thread does it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """One pass at a served module.

    Attributes:
        index: of the pass.
        args: that the model's code gave to the module, positionally.
    """

    index: int
    args: tuple[Tensor, ...]


Serve = Callable[[str, list[Call]], Sequence[Tensor]]
"""Module and the calls of all passes -> their outputs."""


def in_lockstep(
    model: nn.Module,
    served: Iterable[str],
    forwards: Sequence[Forward],
    serve: Serve,
    done: Callable[[int, Any], None],
    clock: Callable[[], float],
) -> list[float]:
    """Run all passes to their ends.

    Args:
        model: whose code the passes run.
        served: modules whose calls go to `serve`; every pass calls them in the same order, with
            positional tensors.
        forwards: the passes.
        serve: computes what the served modules would.
        done: called with the index and the result of a pass that ends, in order.
        clock: seconds.

    Returns:
        Seconds that each pass ran, without `serve`.
    """
    modules = {name: model.get_submodule(name) for name in served}
    passes = [greenlet(forward) for forward in forwards]
    seconds = [0.0] * len(passes)

    def resume(index: int, *value: Tensor) -> tuple[str, Call] | None:
        started = clock()
        found: Any = passes[index].switch(*value)
        seconds[index] += clock() - started
        if passes[index].dead:
            done(index, found)
            return None
        name, args = found
        return name, Call(index, args)

    for name, module in modules.items():
        module.forward = _asking(name)  # shadows that of its class
    try:
        waiting = [resume(index) for index in range(len(passes))]
        while any(waiting):
            names = {at[0] for at in waiting if at is not None}
            assert len(names) == 1 and None not in waiting, f"passes are apart: {names}"
            calls = [at[1] for at in waiting if at is not None]
            outputs = serve(names.pop(), calls)
            del waiting
            waiting = [resume(call.index, out) for call, out in zip(calls, outputs, strict=True)]
    finally:
        for unfinished in passes:
            if unfinished:  # begun, not at its end
                unfinished.throw()
        for module in modules.values():
            del module.forward
    return seconds


def _asking(name: str) -> Callable[..., Any]:
    def forward(*args: Tensor) -> Any:
        parent = getcurrent().parent
        assert parent is not None, "outside of a pass"
        return parent.switch((name, args))

    return forward
