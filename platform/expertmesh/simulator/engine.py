"""The engine of one group: continuous batching, with as little work as there are changes.

Modelled on vLLM's scheduler: in each iteration every sequence that decodes gets one token, and what
is left of the iteration's tokens goes to prompts, first come first served, in chunks. A sequence is
admitted when its whole prompt fits into the cache. When the cache has no room for the next tokens,
the sequence that was admitted last is preempted and computed anew later.

Between two changes (an arrival, a prompt done, an answer done, a preemption) the batch stays the
same and its context grows by a fixed number of tokens, so any number of iterations take a time that
has a closed form: they are one step here.
"""

from collections import deque
from collections.abc import Sequence as SequenceOf
from heapq import heappop, heappush
from math import inf, sqrt
from typing import Any

from expertmesh.simulator.service_time import ServiceTime

_NONE: tuple["Sequence", ...] = ()
_NOT_YET = -1.0
_STALE_ENTRIES = 64
_AT_ONCE_S = 1e-9
"""Less is rounding: what comes so little after an iteration has ended comes as it ends."""


class Sequence:
    """One request, from its arrival to its end."""

    __slots__ = (
        "arrived_at_s",
        "cached_tokens",
        "decoding",
        "ends_at_step",
        "first_token_at_s",
        "index",
        "need_tokens",
        "number",
        "output_tokens",
        "place",
        "preemptions",
        "produced_tokens",
        "prompt_tokens",
        "running",
        "sent_at_s",
    )

    def __init__(
        self,
        index: int,
        arrived_at_s: float,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int = 0,
    ) -> None:
        self.index = index
        self.arrived_at_s = arrived_at_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.cached_tokens = cached_tokens
        """Of the prompt: they need room in the cache, and no time."""
        self.sent_at_s = _NOT_YET
        """To the engine."""
        self.first_token_at_s = _NOT_YET
        self.produced_tokens = 0
        """Only up to date when it does not decode: see `Engine.produced`."""
        self.need_tokens = 0
        """Of the prompt, and of what a preempted one had produced, still to compute."""
        self.running = False
        """Admitted to the batch."""
        self.decoding = False
        self.ends_at_step = 0
        self.number = 0
        """In the order of admission."""
        self.preemptions = 0
        self.place: Any = None
        """Whatever its owner wants to know."""


class Engine:
    """Driven by time: call `step` when `next_s` has come, and before anything later."""

    __slots__ = (
        "_admitted",
        "_alpha_s",
        "_beta_s",
        "_budget_tokens",
        "_chunk_tokens",
        "_chunks",
        "_context_tokens",
        "_decoding",
        "_ends",
        "_gamma_s",
        "_iterations",
        "_left_tokens",
        "_max_seqs",
        "_numbers",
        "_prefilling",
        "_prompt_s",
        "_started_at_s",
        "_steps",
        "_time_s",
        "_waiting",
        "kv_tokens",
        "kv_used_tokens",
        "next_s",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
    )

    def __init__(self, service: ServiceTime) -> None:
        self._alpha_s = service.alpha_s
        self._beta_s = service.beta_s
        self._prompt_s = service.prompt_token_s
        self._gamma_s = service.gamma_s
        self.kv_tokens = service.kv_tokens
        self._max_seqs = service.max_seqs
        self._budget_tokens = service.max_batched_tokens
        self._chunk_tokens = service.prompt_chunk_tokens or service.max_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding = 0
        self._context_tokens = 0
        """Over the sequences that decode."""
        self._ends: list[tuple[int, int, Sequence]] = []
        """Heap of the sequences that decode, by the step after which they end."""
        self._admitted: list[Sequence] = []
        """In this order; some have ended."""
        self._numbers = 0
        self._steps = 0
        """Iterations so far."""
        self._started_at_s = 0.0
        self._iterations = 0
        """Of what is under way."""
        self._time_s = 0.0
        """Of its first iteration; each further one takes longer by the growth of the context."""
        self._chunks: list[tuple[Sequence, int]] = []
        """Prompt tokens of each of its iterations."""
        self._left_tokens = 0
        """Of each of its iterations, that prompts could still have."""
        self.next_s = inf
        """When what is under way ends; infinity: nothing is."""
        self.kv_used_tokens = 0
        """Before what is under way."""
        self.prompt_tokens = 0
        """Computed so far, those of preempted sequences again; see also `progress`."""
        self.output_tokens = 0
        self.preemptions = 0

    @property
    def in_flight(self) -> int:
        return self._decoding + len(self._prefilling) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Not admitted to the batch yet."""
        return len(self._waiting)

    def kv_usage(self, now_s: float) -> float:
        """Share of the cache that is in use, 0 to 1."""
        used = self.kv_used_tokens
        if self._decoding:
            used += self._decoding * min(self._done(now_s), self._iterations)
        return min(1.0, used / self.kv_tokens)

    def fits(self, sequence: Sequence) -> bool:
        """Whether it can ever be served: vLLM refuses what is longer than the cache."""
        return sequence.prompt_tokens + sequence.output_tokens <= self.kv_tokens

    def submit(self, sequence: Sequence, now_s: float) -> bool:
        """True when `next_s` has changed.

        One that comes just as an iteration ends is part of the next, unless `step` came before.
        """
        sequence.sent_at_s = now_s
        others_wait = bool(self._waiting)
        self._waiting.append(sequence)
        before_s = self.next_s
        if before_s == inf:
            self._plan(now_s)
            return True
        if (
            others_wait
            or self._iterations <= 1
            or self._left_tokens <= 0
            or self._decoding + len(self._prefilling) >= self._max_seqs
        ):
            return False  # no earlier admission: every step ends where one becomes possible
        done = min(self._done(now_s - _AT_ONCE_S), self._iterations - 1)
        kv_tokens = self.kv_used_tokens + (done + 1) * self._decoding
        if kv_tokens + sequence.prompt_tokens > self.kv_tokens:
            return False
        self._iterations = done + 1
        self.next_s = max(now_s, self._started_at_s + self._took_s(done + 1))
        return self.next_s != before_s

    def step(self) -> SequenceOf[Sequence]:
        """What is under way ended at `next_s`; returns the sequences whose answers are done."""
        now_s, iterations = self.next_s, self._iterations
        self._steps = steps = self._steps + iterations
        if self._decoding:
            grown = iterations * self._decoding
            self._context_tokens += grown
            self.kv_used_tokens += grown
            self.output_tokens += grown
        finished: list[Sequence] | None = None
        ends = self._ends
        while ends and ends[0][0] <= steps:
            sequence = heappop(ends)[2]
            if sequence.decoding and sequence.ends_at_step <= steps:
                sequence.produced_tokens = sequence.output_tokens
                self._decoding -= 1
                held = sequence.prompt_tokens + sequence.output_tokens
                self._context_tokens -= held
                self.kv_used_tokens -= held
                sequence.running = sequence.decoding = False
                if finished is None:
                    finished = []
                finished.append(sequence)
        if self._chunks:
            for sequence, tokens in self._chunks:
                computed = tokens * iterations
                self.prompt_tokens += computed
                sequence.need_tokens -= computed
                if not sequence.need_tokens and self._prefilled(sequence, now_s):
                    if finished is None:
                        finished = []
                    finished.append(sequence)
        self._plan(now_s)
        return _NONE if finished is None else finished

    def progress(self, now_s: float) -> tuple[float, float]:
        """Prompt and output tokens so far, those of what is under way included."""
        prompt, output = float(self.prompt_tokens), float(self.output_tokens)
        if self.next_s == inf:
            return prompt, output
        length_s = self.next_s - self._started_at_s
        elapsed_s = now_s - self._started_at_s
        share = min(1.0, max(0.0, elapsed_s / length_s)) if length_s > 0.0 else 1.0
        iterations = self._iterations * share
        chunk = sum(tokens for _, tokens in self._chunks)
        return prompt + iterations * chunk, output + iterations * self._decoding

    def produced(self, sequence: Sequence, now_s: float) -> int:
        """Its output tokens so far."""
        if not sequence.decoding:
            return sequence.produced_tokens
        left = sequence.ends_at_step - self._steps - min(self._done(now_s), self._iterations)
        return sequence.output_tokens - left

    def abort(self, now_s: float) -> list[Sequence]:
        """All of it stops; returns what was in flight, in the order of admission."""
        stopped = [s for s in self._admitted if s.running]
        for sequence in stopped:
            sequence.produced_tokens = self.produced(sequence, now_s)
            sequence.running = sequence.decoding = False
        stopped += self._waiting
        self._waiting.clear()
        self._prefilling.clear()
        self._ends.clear()
        self._admitted.clear()
        self._chunks = []
        self._decoding = self._context_tokens = self.kv_used_tokens = 0
        self.next_s = inf
        return stopped

    def _prefilled(self, sequence: Sequence, now_s: float) -> bool:
        """It has its first token, or one more after a preemption; True when that is its last."""
        if self._prefilling[0] is sequence:
            self._prefilling.popleft()
        else:
            self._prefilling.remove(sequence)
        if sequence.first_token_at_s < 0.0:
            sequence.first_token_at_s = now_s
        self.output_tokens += 1
        sequence.produced_tokens += 1
        produced = sequence.produced_tokens
        left = sequence.output_tokens - produced
        if left <= 0:
            sequence.running = False
            self.kv_used_tokens -= sequence.prompt_tokens + produced - 1
            return True
        self.kv_used_tokens += 1
        self._context_tokens += sequence.prompt_tokens + produced
        self._decoding += 1
        sequence.decoding = True
        sequence.ends_at_step = ends = self._steps + left
        heappush(self._ends, (ends, sequence.number, sequence))
        return False

    def _plan(self, now_s: float) -> None:
        """What happens next, until the batch changes."""
        decoding = self._decoding
        admits = True
        if decoding and self.kv_used_tokens + decoding > self.kv_tokens:
            self._preempt()
            decoding = self._decoding
            admits = False
        chunks: list[tuple[Sequence, int]] = []
        room = left = max(0, self._budget_tokens - decoding)
        if left and (self._prefilling or self._waiting):
            most = self._chunk_tokens
            for sequence in self._prefilling:
                tokens = min(sequence.need_tokens, left, most)
                chunks.append((sequence, tokens))
                left -= tokens
                if not left:
                    break
            if admits and left and self._waiting:
                left = self._admit(chunks, left)
        self._left_tokens = left
        self._chunks = chunks
        if not decoding and not chunks:
            self._iterations = 0
            self._started_at_s = now_s
            self.next_s = inf
            return
        prompt_tokens = room - left
        iterations = 1
        if admits:
            # The chunks stay the same until one of the prompts has less left than its chunk.
            if chunks:
                iterations = min([each.need_tokens // tokens for each, tokens in chunks])
            if not chunks or (iterations > 1 and decoding):
                change = self._until_change()
                iterations = min(iterations, change) if chunks else change
        self._iterations = iterations
        self._started_at_s = now_s
        self._time_s = (
            self._alpha_s
            + self._beta_s * decoding
            + self._prompt_s * prompt_tokens
            + self._gamma_s * self._context_tokens
        )
        self.next_s = now_s + self._took_s(iterations)

    def _until_change(self) -> int:
        """Iterations until an answer is done or the cache is full, at least 1."""
        ends, steps = self._ends, self._steps
        while not ends[0][2].decoding or ends[0][0] != ends[0][2].ends_at_step:
            heappop(ends)  # preempted since
        return max(
            1,
            min(
                ends[0][0] - steps,
                (self.kv_tokens - self.kv_used_tokens) // self._decoding,
            ),
        )

    def _admit(self, chunks: list[tuple[Sequence, int]], left: int) -> int:
        """Adds their chunks; returns the tokens of the iteration that are still free."""
        waiting = self._waiting
        free_seqs = self._max_seqs - self._decoding - len(self._prefilling)
        # The next token of every sequence that decodes goes before.
        free_tokens = self.kv_tokens - self.kv_used_tokens - self._decoding
        while waiting and left and free_seqs > 0:
            sequence = waiting[0]
            held = sequence.prompt_tokens + sequence.produced_tokens
            if held > free_tokens and self._decoding + len(self._prefilling):
                break
            waiting.popleft()
            free_tokens -= held
            free_seqs -= 1
            self.kv_used_tokens += held
            self._numbers += 1
            sequence.number = self._numbers
            sequence.running = True
            sequence.need_tokens = need = held - sequence.cached_tokens
            self._prefilling.append(sequence)
            self._admitted.append(sequence)
            tokens = min(need, left, self._chunk_tokens)
            chunks.append((sequence, tokens))
            left -= tokens
        if len(self._admitted) > 2 * (self._decoding + len(self._prefilling)) + _STALE_ENTRIES:
            self._admitted = [s for s in self._admitted if s.running]
        return left

    def _preempt(self) -> None:
        admitted = self._admitted
        while self.kv_used_tokens + self._decoding > self.kv_tokens:
            sequence = admitted.pop()
            if not sequence.running:
                continue
            if sequence.decoding:
                left = sequence.ends_at_step - self._steps
                sequence.produced_tokens = sequence.output_tokens - left
                self._decoding -= 1
                self._context_tokens -= sequence.prompt_tokens + sequence.produced_tokens
            else:
                self._prefilling.remove(sequence)
            self.kv_used_tokens -= sequence.prompt_tokens + sequence.produced_tokens
            sequence.running = sequence.decoding = False
            sequence.preemptions += 1
            self.preemptions += 1
            self._waiting.appendleft(sequence)

    def _took_s(self, iterations: int) -> float:
        growth_s = self._gamma_s * self._decoding
        return iterations * (self._time_s + growth_s * (iterations - 1) / 2.0)

    def _done(self, now_s: float) -> int:
        """Whole iterations of what is under way."""
        elapsed_s = now_s - self._started_at_s
        half_growth_s = self._gamma_s * self._decoding / 2.0
        first_s = self._time_s - half_growth_s
        if elapsed_s <= 0.0:
            return 0
        # The root of half_growth * k² + first * k = elapsed, in the form without cancellation.
        root = sqrt(first_s * first_s + 4.0 * half_growth_s * elapsed_s)
        divisor = first_s + root
        if divisor <= 0.0:
            return self._iterations
        return int(2.0 * elapsed_s / divisor)
