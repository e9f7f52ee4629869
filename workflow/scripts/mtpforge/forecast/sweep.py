"""The rounds of llama-server that measure a file's speed: those that the search itself takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mtpforge.forecast import costs
from mtpforge.forecast.costs import Cost, Machine, Tokens
from mtpforge.measure import pairs
from mtpforge.measure.speed import WARM_UP, draft_lengths
from mtpforge.prompts import answer_tokens
from mtpforge.rules.config import MeasureSettings


@dataclass(frozen=True)
class Sweep:
    """Rounds of the search, the pairs that these measure, and what follows with no drafting.

    `rounds` is 0 if llama-server cannot draft with the file.
    """

    rounds: int
    pairs: int
    repeats: int
    prompts: int
    forms: int

    @property
    def one(self) -> "Sweep":
        """Its first round alone, in one form."""
        return replace(self, rounds=0, pairs=0, repeats=1, forms=1)

    @property
    def servers(self) -> int:
        """How often llama-server is started."""
        off = self.repeats
        return off + (self.rounds + self.repeats - 1 if self.rounds else 0)

    @property
    def tokens(self) -> Tokens:
        """What all servers generate."""
        off = self._tokens(firsts=1, later=self.repeats - 1)
        later = self.rounds - self.pairs + self.repeats - 1
        return Tokens(off, self._tokens(self.pairs, later) if self.rounds else 0)

    def shorter(self) -> Iterator["Sweep"]:
        """This, and those with fewer rounds of the search, down to one."""
        yield self
        for rounds in range(self.rounds - 1, 0, -1):
            yield replace(self, rounds=rounds, pairs=min(self.pairs, rounds))

    def _tokens(self, firsts: int, later: int) -> int:
        """Those of first rounds, with one prompt twice, and of later ones; one has all forms."""
        answer = answer_tokens(self.prompts)
        requests = self.prompts * (firsts + later + self.forms - 1) + firsts
        return requests * answer + later * WARM_UP


def sweep(settings: MeasureSettings, prompts: int, blocks: int) -> Sweep:
    """The rounds for a file whose head has so many blocks; 0 if llama-server cannot draft."""
    rounds = tried = 0
    if blocks:
        search = pairs.expected(draft_lengths(settings.n_max, blocks), settings.p_min)
        rounds, tried = search.rounds, len(search.speeds)
    return Sweep(rounds, tried, settings.repeats, prompts, len(settings.forms))


def cost(
    planned: Sweep, minutes: float, size: float, machine: Machine, share: float = 1
) -> tuple[Sweep, Cost]:
    """The rounds that there are `minutes` for, and their cost."""
    for each in planned.shorter():
        found = costs.run(size, machine, each.tokens, each.servers, share)
        if found.seconds <= 60 * minutes:
            break
    return each, found
