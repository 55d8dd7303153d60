"""Do all ranks train the same parameters? Buckets of others match by chance, or not at all."""

from collections.abc import Collection, Sequence

import torch.distributed as dist

from dpmem.lockstep import Lockstep, Member


class PlanCheck:
    """Compares what this rank trains with what another one does, once whenever it changes."""

    def __init__(self, names: Sequence[str], lockstep: Lockstep) -> None:
        self._names = names
        self._lockstep = lockstep
        self._is_untold = self._is_unchecked = False
        self._trained = ""

    def changed(self, trainable: Collection[int]) -> None:
        """From the next backward on these are trained."""
        trained = frozenset(trainable)
        self._trained = "".join("01"[i in trained] for i in range(len(self._names)))
        self._is_untold = self._is_unchecked = True

    def tell(self, member: Member) -> None:
        """Before a backward of this member begins."""
        if self._is_untold:
            self._is_untold = False
            self._lockstep.tell_plan(member, self._trained)

    def ask(self, member: Member) -> None:
        """Before a bucket is launched. Raises RuntimeError where the next rank trains others.

        Then there is no going on: what they wait for is of different sizes.
        """
        if not self._is_unchecked:
            return
        answer = self._lockstep.plan_of_next(member)
        if answer is None:
            # It failed: asked again in the step that all try next.
            return
        self._is_unchecked = False
        if answer[1] == self._trained:
            return
        rank, theirs = answer
        pairs = zip(self._names, self._trained, theirs, strict=True)
        different = [name for name, mine, other in pairs if mine != other]
        error = RuntimeError(
            "all ranks must train the same parameters; requires_grad differs between rank "
            f"{dist.get_rank()} and rank {rank} for {len(different)}, such as {different[0]!r}; "
            "freeze alike on all ranks, and start again from a checkpoint"
        )
        self._lockstep.give_up(error, "averaging")
        raise error
