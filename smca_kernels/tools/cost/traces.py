"""Paths through machine code: the instructions that a warp issues in one trip of a loop, or in a whole program.

Nothing is executed, so a path is chosen: a block that runs on a condition is run, loops over tiles and scales make the
trips that are asked for, all other loops one, and loops for rare inputs are passed by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from smca_kernels.tools.cost.machine_code import ControlFlow, Instruction, control_flow, find_loops

MAX_STEPS = 2_000_000  # of a path; more is a mistake in the choices


def trace_loop(instructions: Sequence[Instruction], body: Sequence[int]) -> list[int]:
    """List the instructions of one trip of a loop in the order of their issue.

    Args:
        instructions: the whole function.
        body: indices of the loop's instructions, as `find_loops` gives them.
    """
    flow, inside, header = control_flow(instructions), set(body), loop_header(instructions, body)
    path: list[int] = []
    at = header
    while len(path) < len(body):
        path.append(at)
        following = at + 1
        if at in flow.jumps and not (instructions[at].falls_through and following in inside):
            following = flow.jumps[at]
        if following == header:
            return path
        if following not in inside:
            break
        at = following
    return list(body)  # no path back: all of it, in the order of addresses


def trace_program(
    instructions: Sequence[Instruction], tile_loop: Sequence[int], rare: Collection[int], trips: Sequence[int]
) -> list[int]:
    """List the instructions of a whole program in the order of their issue.

    Args:
        instructions: the whole function.
        tile_loop: indices of the loop over tiles; empty where there is none.
        rare: headers of loops that are passed by.
        trips: of the loop over tiles, for each trip of the loop around it (one number where there is none).

    Raises:
        ValueError: if no such path exists, or if a kernel without a loop over scales is given several.
    """
    walk = _Walk(instructions, tile_loop, rare, trips)
    return walk.path()


def loop_header(instructions: Sequence[Instruction], body: Sequence[int]) -> int:
    """Find a loop's first instruction: the one that is jumped to from inside and entered from outside."""
    flow, inside = control_flow(instructions), set(body)
    blocks = {flow.block_of(i) for i in body}
    entered = [b for b in blocks if flow.predecessors[b] - blocks or flow.starts[b] == 0]
    targets = {flow.block_of(flow.jumps[i]) for i in body if flow.jumps.get(i) in inside}
    return flow.starts[min(targets.intersection(entered) or targets or blocks)]


class _Walk:
    """A path from a function's first instruction to its exit."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        tile_loop: Sequence[int],
        rare: Collection[int],
        trips: Sequence[int],
    ) -> None:
        self.instructions = instructions
        self.flow: ControlFlow = control_flow(instructions)
        bodies = {loop_header(instructions, body): frozenset(body) for body in find_loops(instructions)}
        self.tile = loop_header(instructions, tile_loop) if tile_loop else None
        tiles = frozenset(tile_loop)
        around = sorted((body for body in bodies.values() if tiles and tiles < body), key=len)
        self.scales = next((h for h, body in bodies.items() if around and body == around[0]), None)
        if tile_loop and self.scales is None and len(trips) != 1:
            raise ValueError(f"the kernel has no loop over scales, got trips for {len(trips)}")
        self.bodies = sorted(bodies.items(), key=lambda item: len(item[1]))
        self.rare = {self.flow.block_of(header) for header in rare}
        self.trips = trips
        self.scale = 0 if self.scales is None else -1
        self.visits = dict.fromkeys(bodies, 0)
        self.reached: dict[tuple[int, int], bool] = {}

    def path(self) -> list[int]:
        path: list[int] = []
        at = 0
        while len(path) < MAX_STEPS:
            if at in self.visits:
                self.enter(at)
            path.append(at)
            instruction = self.instructions[at]
            if at in self.flow.jumps:
                at = self.choose(at) if instruction.falls_through else self.flow.jumps[at]
            elif instruction.falls_through and at + 1 < len(self.instructions):
                at += 1
            else:
                return path
        raise ValueError(f"no path to the kernel's exit in {MAX_STEPS} instructions")

    def enter(self, header: int) -> None:
        """Count a trip; a new scale starts the loop over tiles again."""
        self.visits[header] += 1
        if header == self.scales:
            self.scale += 1
            if self.tile is not None:
                self.visits[self.tile] = 0

    def wanted_trips(self, header: int) -> int:
        if header == self.tile:
            return self.trips[min(self.scale, len(self.trips) - 1)]
        return len(self.trips) if header == self.scales else 1

    def choose(self, at: int) -> int:
        """Decide where a conditional jump goes."""
        options = (at + 1, self.flow.jumps[at])
        for header, body in self.bodies:
            stays = [option in body for option in options]
            if at in body and stays[0] != stays[1]:
                stay, leave = options if stays[0] else options[::-1]
                if self.visits[header] < self.wanted_trips(header):
                    return stay
                self.visits[header] = 0 if header != self.tile else self.visits[header]
                return leave
        possible = [option for option in options if self.leads_on(option)]
        return possible[0] if possible else options[0]

    def leads_on(self, option: int) -> bool:
        """Whether the loop over tiles, as long as it is due, or else the exit, can be reached without rare loops."""
        due = self.tile is not None and self.visits[self.tile] == 0 and self.wanted_trips(self.tile) > 0
        goal = self.flow.block_of(self.tile) if self.tile is not None and due else -1
        start = self.flow.block_of(option)
        if (start, goal) not in self.reached:
            barred = set(self.rare)
            if due and self.scales is not None and self.scale >= 0:
                barred.add(self.flow.block_of(self.scales))  # a way round through the next scale does not count
            if self.tile is not None and not due:
                barred.add(self.flow.block_of(self.tile))
            self.reached[start, goal] = self.search(start, goal, barred)
        return self.reached[start, goal]

    def search(self, start: int, goal: int, barred: set[int]) -> bool:
        seen, pending = {start}, [start]
        while pending:
            block = pending.pop()
            if block == goal:
                return True
            if block in barred:
                continue
            if goal < 0 and not self.flow.successors[block]:
                return True
            if goal < 0 and self.scales is not None and block == self.flow.block_of(self.scales):
                return True
            following = self.flow.successors[block] - seen
            seen |= following
            pending.extend(following)
        return False
