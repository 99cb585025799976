"""The roles of a CTA whose consumer warpgroups have a GEMM each (kernels/backward/split.py), as backward_roles.py has
the others. dO has a ring of its own here: not all roles read it.
"""

from itertools import product

import backward_roles
from backward_consumer import Consumer, Entry
from backward_order import Launch, Warp
from backward_roles import NOW, Cta, Grid
from barriers import Slots

from fa3_cute.kernels.backward.duties import rounds_of
from fa3_cute.kernels.backward.outgoing import has_second_half
from fa3_cute.kernels.backward.split import PRODUCTS, QUERIES, SCORES
from fa3_cute.planning.rings import WARPS_PER_WARPGROUP, by_name


class SplitConsumer(Consumer):
    """A warpgroup; w: its role."""

    def consume(self, entry: Entry):
        """A tile of keys."""
        has_keys = not self.cfg.is_varlen or entry.tile.seqlen_k > 0
        if has_keys:
            yield self.cta.k.filled(self.num_keys)
        if self.w != SCORES or not entry.passes:
            yield self.sync(self.cta.free)
        step = {SCORES: self.step_of_scores, PRODUCTS: self.step_of_products, QUERIES: self.step_of_queries}[self.w]
        for i in range(len(entry.passes)):
            yield from step(entry, i)
            self.turn += 1
        if entry.passes:
            yield from self.finish()
        if has_keys:
            self.release(self.cta.k, self.num_keys)
            self.num_keys += 1
        yield from self.leave(entry)

    def step_of_scores(self, entry: Entry, i: int):
        """P of the i-th Q tile; dV and dK of the one before."""
        cta = self.cta
        yield self.there(cta.q, self.turn)
        self.check(cta.q, entry, i)
        if i > 0:
            self.has_read(cta.p, self.turn - 1)
            for slots in (cta.do, cta.p):
                self.release(slots, self.turn - 1)
        else:
            yield self.sync(cta.free)
        yield self.place_of_p()
        self.write(cta.p, (SCORES, PRODUCTS))
        if i > 0:
            yield self.there(cta.ds, self.turn - 1)
            self.release(cta.q, self.turn - 1)
            self.has_read(cta.ds, self.turn - 1)
            self.release(cta.ds, self.turn - 1)
        self.fill(cta.p, self.turn)
        yield self.there(cta.do, self.turn)
        self.check(cta.do, entry, i)

    def place_of_p(self):
        """What scores waits for before it writes P."""
        return self.cta.p.emptied(self.turn)

    def step_of_products(self, entry: Entry, i: int):
        """dS of it; dV and dK of the one before."""
        cta = self.cta
        yield self.there(cta.do, self.turn)
        self.check(cta.do, entry, i)
        if i > 0:
            self.release_all(self.turn - 1)
        yield self.there(cta.p, self.turn)
        yield cta.ds.emptied(self.turn)
        self.write(cta.ds, (SCORES, PRODUCTS, QUERIES))
        self.fill(cta.ds, self.turn)
        yield self.there(cta.q, self.turn)
        self.check(cta.q, entry, i)

    def release_all(self, turn: int):
        """What products has read for dV and dK."""
        cta = self.cta
        for slots in (cta.p, cta.ds):
            self.has_read(slots, turn)
        for slots in (cta.do, cta.q, cta.p):
            self.release(slots, turn)

    def step_of_queries(self, entry: Entry, i: int):
        """dK and dQ of it. The reduce role is told of a part when the next GEMM is issued."""
        cta, parts = self.cta, self.cfg.num_dq_wgs
        yield self.there(cta.q, self.turn)
        self.check(cta.q, entry, i)
        yield self.there(cta.ds, self.turn)
        for part in range(parts):
            number = parts * self.turn + part
            if i + part > 0:
                self.fill(cta.dq, number - 1)
            if part == 0:
                self.release(cta.q, self.turn)
            if part == parts - 1:
                self.has_read(cta.ds, self.turn)
                self.release(cta.ds, self.turn)
            yield cta.dq.emptied(number)
            assert cta.dq.content[number % 2] is None, "dQ where another is not added"
            assert not any(cta.leaving[1]), "dQ where what leaves is not sent"
            cta.dq.content[number % 2] = number, entry, entry.passes[i]

    def finish(self):
        """What comes a Q tile later, of the last one."""
        last = self.turn - 1
        if self.w == QUERIES:
            self.fill(self.cta.dq, self.cfg.num_dq_wgs * self.turn - 1)
        elif self.w == PRODUCTS:
            self.release_all(last)
        else:
            yield self.there(self.cta.ds, last)
            for slots in (self.cta.p, self.cta.ds):
                self.has_read(slots, last)
            for slots in (self.cta.do, self.cta.q, self.cta.p, self.cta.ds):
                self.release(slots, last)

    def there(self, slots: Slots, turn: int):
        """What a slot of the turn is waited for with."""
        return slots.filled(turn)

    def fill(self, slots: Slots, turn: int):
        """Tells its readers."""
        slots.full[turn % slots.number].arrive(WARPS_PER_WARPGROUP)

    def check(self, slots: Slots, entry: Entry, i: int):
        """That Q or dO of the i-th is there."""
        assert slots.content[self.turn % 2] == (entry, entry.passes[i])

    def write(self, slots: Slots, readers: tuple[int, ...]):
        """P or dS, which they read, over what all have read."""
        assert not slots.content[0], "P or dS where the one before is not read"
        assert not any(self.cta.leaving[0]), "P or dS where what leaves is not sent"
        slots.content[0] = {(role, self.turn) for role in readers}

    def has_read(self, slots: Slots, turn: int):
        """P or dS of that turn, which must be there."""
        slots.content[0].remove((self.w, turn))

    def leave(self, entry: Entry):
        """Half the keys of dV, then of dK, at either place, or the first half of both; then the duty's dQ."""
        cta = self.cta
        yield self.sync(cta.sums)
        if self.cfg.shares_tiles and entry.tile.seqlen_k > 0:
            self.share(entry.tile)
        has_keys = entry.tile.seqlen_k > 0
        self.read(entry.duty, 0)
        if has_keys:
            self.stage(0)
            for i in range(2):
                yield cta.dq.emptied(self.cfg.num_dq_wgs * self.turn + i)
            self.stage(1)
        if self.has_second_half(entry.tile):
            for place in range(2):
                yield self.sync(cta.free)
                self.stage(place)
        self.read(entry.duty, 1)
        for i in range(rounds_of(self.cfg, entry.duty)):
            self.read(entry.duty, i + 2)
            if has_keys or i > 0:
                yield self.sync(cta.free)
            self.stage(i % 2)

    def has_second_half(self, tile) -> bool:
        """That leaves."""
        return has_second_half(self.cfg, tile)

    def stage(self, place: int):
        """The warpgroup's part of what leaves, in a place where nothing else is."""
        cta = self.cta
        assert not cta.leaving[place][self.w], "what was there is not sent"
        there = (cta.p.content[0], cta.ds.content[0]) if place == 0 else cta.dq.content
        assert not any(there), "what was there is not read"
        cta.leaving[place][self.w] = True
        self.sync(cta.staged[place])


class SplitCta(Cta):
    """Its shared memory, and the warps that load, add and send."""

    consumer = SplitConsumer

    def __init__(self, grid):
        """Before it has begun."""
        super().__init__(grid)
        rings = by_name(self.cfg.rings)
        self.do, self.p = Slots(rings["do"]), Slots(rings["p"])
        self.p.content, self.ds.content = [set()], [set()]

    def load(self, entry: Entry):
        """K and V, if any, then Q and dO."""
        if not self.cfg.is_varlen or entry.tile.seqlen_k > 0:
            yield self.k.emptied(self.num_loaded[0])
            self.k.full[0].arrive()
            self.num_loaded[0] += 1
        for passing, slots in product(entry.passes, (self.q, self.do)):
            turn = self.num_loaded[1]
            yield slots.emptied(turn)
            slots.content[turn % 2] = entry, passing
            slots.full[turn % 2].arrive()
            self.num_loaded[1] += slots is self.do
        yield from self.tell_of_loads(len(entry.passes) == 1)

    def reduce(self, entry: Entry):
        """Adds parts as they come, of which two are on their way."""
        unit, added, sent = (yield from self.wait_for_slot(entry)), [], []
        for passing, part in product(entry.passes, range(self.cfg.num_dq_wgs)):
            number = self.num_added[0]
            yield self.dq.filled(number)
            added.append(self.place_of_sums(entry, unit, passing, part))
            sent.append((number % 2, (number, entry, passing)))
            if len(sent) == 2:
                self.empty_dq(*sent.pop(0))
            self.num_added[0] += 1
        for slot, content in sent:
            self.empty_dq(slot, content)
        yield NOW
        for where in added:
            self.grid.sums[where] += 1
        self.count_as_added(entry, unit)

    def send_keys(self, tile):
        """Half the keys of dV, then of dK; or the first half of both."""
        yield from self.send(0)
        self.tell_of_part(tile)
        yield from self.send(1)
        if self.has_second_half(tile):
            self.set_free(1)
            yield from self.send(0)
            self.set_free(1)
            yield from self.send(1)

    def has_second_half(self, tile) -> bool:
        """That is sent."""
        return has_second_half(self.cfg, tile)


def run_all(launch: Launch, device: Warp, num_ctas: int, kind: type[Cta] | None = None) -> Grid:
    """backward_roles.run_all, with CTAs of the launch's kernel if of no other kind."""
    return backward_roles.run_all(launch, device, num_ctas, kind or (SplitCta if launch.cfg.is_split else Cta))
