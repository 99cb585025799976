"""Threads that wait for one another: mbarriers with their phases, named barriers, rings of slots, and roles that run at
any speed. A role is a generator of what must hold before its next step."""

from random import Random

from fa3_cute.planning.rings import WARP, Ring

NOW = lambda: True  # for what need not wait, and yet others may come between


class Mbarrier:
    """Of so many arrivals each phase."""

    def __init__(self, arrivals: int):
        """In its first phase."""
        self.arrivals = self.missing = arrivals
        self.phase = 0

    def arrive(self, number: int = 1):
        """So many threads."""
        self.missing -= number
        assert self.missing >= 0, "more arrive than a phase has"
        if self.missing == 0:
            self.missing, self.phase = self.arrivals, self.phase ^ 1

    def passed(self, parity: int):
        """What a thread waits for that waits for the phase of that parity."""
        return lambda: self.phase != parity


class NamedBarrier:
    """Of so many threads."""

    def __init__(self, threads: int):
        """Before anyone has come."""
        self.threads, self.arrived, self.number = threads, {}, 0

    def arrive(self, role: str, threads: int = WARP):
        """A role's threads; returns what they wait for if they do."""
        assert role not in self.arrived, f"{role} arrives twice"
        self.arrived[role], number = threads, self.number
        assert sum(self.arrived.values()) <= self.threads
        if sum(self.arrived.values()) == self.threads:
            self.arrived, self.number = {}, number + 1
        return lambda: self.number > number


class Slots:
    """A ring's, each with its two mbarriers and what is in it."""

    def __init__(self, ring: Ring):
        """All empty."""
        self.number = ring.slots
        self.full, self.empty = ([Mbarrier(of) for _ in range(ring.slots)] for of in (ring.full, ring.empty))
        self.content = [None] * ring.slots

    def filled(self, turn: int):
        """What a consumer waits for in its turn."""
        return self.full[turn % self.number].passed(turn // self.number % 2)

    def emptied(self, turn: int):
        """What a producer waits for."""
        return self.empty[turn % self.number].passed(turn // self.number % 2 ^ 1)


class Role:
    """One that runs. speed: how likely it is to go on if it may."""

    def __init__(self, name: str, work, speed: float):
        """Up to the first thing that it waits for."""
        self.name, self.work, self.speed, self.wait = name, work, speed, next(work)

    def advance(self, steps: int):
        """So many, or until something holds it up."""
        while steps and self.wait and self.wait():
            self.wait, steps = next(self.work, None), steps - 1


def run(roles: list[Role], draw: Random):
    """Until all have ended."""
    while roles:
        ready = [role for role in roles if role.wait()]
        if not ready:
            raise TimeoutError(f"waiting: {', '.join(role.name for role in roles)}")
        chosen = [role for role in ready if draw.random() < role.speed] or [draw.choice(ready)]
        draw.shuffle(chosen)
        for role in chosen:
            role.advance(50 if draw.random() < 0.25 else 1)
        roles = [role for role in roles if role.wait]
