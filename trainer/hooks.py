"""What happens after a step: each hook an interval and a call, in an order that loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A step that has been done."""

    step: int
    last: bool  # the run ends here
    stopping: bool  # a signal asked for the end


@dataclass(frozen=True)
class Hook:
    """A call that is due every so many steps, and at the last one."""

    name: str
    every: int  # steps; 0 = at the last one alone
    call: Callable[[Moment], None]
    when_stopping: bool = False  # also where a signal ends the run
    before: tuple[Hook, ...] = ()  # also wherever one of these is due

    def due(self, moment: Moment) -> bool:
        """Whether to call it now."""
        if moment.last or (moment.stopping and self.when_stopping):
            return True
        if self.every > 0 and moment.step % self.every == 0:
            return True
        return any(hook.due(moment) for hook in self.before)


def run_hooks(hooks: Iterable[Hook], moment: Moment) -> None:
    """Call what is due, in order."""
    for hook in hooks:
        if hook.due(moment):
            hook.call(moment)
