"""Continuous batching: prefill what waits, step what runs, retire what ends, until nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from upslope.engine.batch import Batch
from upslope.engine.graphs import Graphs
from upslope.engine.sampling import sample
from upslope.engine.scheduler import Admission, Scheduler
from upslope.engine.types import Completion, Finish, Request
from upslope.errors import DataError, Interrupted, RunError
from upslope.kernels.products import Product
from upslope.models.runner import DecoderRunner
from upslope.models.trunk import Cache, Runner, Trunk, tokens_seen
from upslope.ragged import Ragged

PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}  # prompt tokens computed at once
PIECE = 8  # tokens decoded to look for a stop text: as many as its characters, and these for its edges


class Engine:
    """Generation over one runner.

    text_of turns ids into text, for stop texts; valid_vocab is the tokenizer's size where the model's is padded. With
    a mask runner, top_k and top_p are read from its distribution instead of the policy's own (NLPO).
    """

    def __init__(
        self,
        runner: Runner,
        *,
        eos_id: int | Sequence[int],
        slots: int = 64,
        seed: int = 0,
        text_of: Callable[[list[int]], str] | None = None,
        valid_vocab: int | None = None,
        mask_runner: Runner | None = None,
    ) -> None:
        self.runner = runner
        self.runners = [runner] if mask_runner is None else [runner, mask_runner]
        self.projections = [Product(r.output_weight, dtype=r.output_weight.dtype) for r in self.runners]
        self.eos = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
        self.slots = slots
        self.seed = seed
        self.text_of = text_of
        self.valid_vocab = valid_vocab
        self.graphs: Graphs | None = None
        self.version = 0

    def load(self, model: Trunk, version: int, mask: Trunk | None = None) -> None:
        """Take over a model's weights under a version number, and the mask's where there is a runner for it.

        Raises RunError when they did not arrive.
        """
        for runner, projection, source in zip(self.runners, self.projections, (model, mask), strict=False):
            if source is not None:
                runner.load(source)
                projection.load(runner.output_weight)
                if runner.checksum() != runner.checksum_of(source):
                    raise RunError(
                        f"weights of version {version} did not reach the engine", "start the run again; it carries on"
                    )
        self.version = version

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        step: int,
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """All samples of all requests, in their order. `step` keys the random numbers together with the seed.

        Raises DataError before any work for a prompt that is empty or does not fit the context, Interrupted when
        should_stop answers yes between two tokens.
        """
        self._check(requests)
        scheduler = Scheduler(requests, self.slots, self.version)
        total = len(scheduler.waiting)
        if not total:
            return []
        capacity = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
        if len(self.runners) == 1 and Graphs.serve(self.runner, requests):
            rounds = self._recorded(scheduler, capacity, step)
        else:
            rounds = self._by_token(
                scheduler, [r.new_cache(min(self.slots, total), capacity) for r in self.runners], step
            )
        while not scheduler.done:
            if should_stop is not None and should_stop():
                raise Interrupted("generation was stopped", "the same command carries on")
            tokens = next(rounds)
            if progress is not None:
                progress(tokens, len(scheduler.finished))
        return scheduler.results()

    def _by_token(self, scheduler: Scheduler, caches: Sequence[Any], step: int) -> Iterator[int]:
        """One token for every running slot and the first of those that are admitted, until all is done: the tokens so
        far, round by round."""
        tokens, batch = 0, None
        while not scheduler.done:
            pending = torch.tensor([c.ids[-1] for c in scheduler.running])
            stepped = [[r.step(c, pending)] if len(pending) else [] for r, c in zip(self.runners, caches, strict=True)]
            admissions = scheduler.admit(PREFILL_TOKENS[self.runner.device.type])
            hidden = [
                torch.cat([*rows, *self._prefill(scheduler, admissions, runner, cache)])
                for rows, runner, cache in zip(stepped, self.runners, caches, strict=True)
            ]
            if batch is None or admissions:
                batch = Batch(scheduler.running, scheduler.requests, hidden[0].device)
            ended = self._extend(batch, hidden, step)
            tokens += len(scheduler.running)
            batch = None if ended else batch
            _retire(scheduler, ended, caches)
            yield tokens

    def _recorded(self, scheduler: Scheduler, capacity: int, step: int) -> Iterator[int]:
        """The same in rounds of several tokens, by recorded steps."""
        if self.graphs is None:
            assert isinstance(self.runner, DecoderRunner)
            self.graphs = Graphs(self.runner, self.projections[0], self.slots, self.valid_vocab)
        cache, tokens = self.graphs.new_cache(capacity), 0
        while not scheduler.done:
            before = len(scheduler.running)
            admissions = scheduler.admit(PREFILL_TOKENS[self.runner.device.type])
            if admissions:
                hidden = torch.cat(self._prefill(scheduler, admissions, self.runner, cache))
                batch = Batch(scheduler.running[before:], scheduler.requests, hidden.device)
                tokens += len(hidden)
                _retire(scheduler, [before + slot for slot in self._extend(batch, [hidden], step)], [cache])
            if scheduler.running:
                ids, logp = self.graphs.run(scheduler.running, scheduler.requests, self.seed, step)
                found = zip(scheduler.running, ids.t().tolist(), logp.t().tolist(), self._until_end(ids), strict=True)
                before = sum(len(c.ids) for c in scheduler.running)
                ended = [slot for slot, (c, *drawn) in enumerate(found) if self._take(c, scheduler.requests, *drawn)]
                tokens += sum(len(c.ids) for c in scheduler.running) - before
                _retire(scheduler, ended, [cache])
            yield tokens

    def _until_end(self, ids_KS: Tensor) -> list[int]:
        """How many tokens each slot has up to the first that ends it, that one included."""
        ends = torch.isin(ids_KS, torch.tensor(sorted(self.eos), dtype=torch.int64))
        ends[-1] = True
        return (ends.to(torch.uint8).argmax(0) + 1).tolist()

    def _take(
        self, completion: Completion, requests: Sequence[Request], ids: list[int], logp: list[float], count: int
    ) -> bool:
        """Append `count` drawn tokens, or as many as there may be; whether the completion ends with one of them."""
        request = requests[completion.request]
        count = min(count, request.sampling.max_tokens - len(completion.ids))
        at_once = 1 if request.sampling.stop else count
        for start in range(0, count, at_once):
            completion.ids += ids[start : start + at_once]
            completion.logp += logp[start : start + at_once]
            finish = self._finish(completion, request)
            if finish is not None:
                completion.finish = finish
                return True
        return False

    @staticmethod
    def _prefill(scheduler: Scheduler, admissions: Sequence[Admission], runner: Runner, cache: Cache) -> list[Tensor]:
        """The hidden rows of the slots that the admissions take, in their order."""
        if not admissions:
            return []
        prompts = Ragged.of([scheduler.requests[a.request].prompt_ids for a in admissions])
        hidden_PD = runner.prefill(cache, prompts, [a.slots for a in admissions])
        return [hidden_PD[p : p + 1].expand(len(a.slots), -1) for p, a in enumerate(admissions)]

    def _extend(self, batch: Batch, hidden: Sequence[Tensor], step: int) -> list[int]:
        """Choose a token for every running slot and append it; returns the slots that ended.

        hidden: one hidden_SD for each runner.
        """
        logits_SV, *mask = (project(h) for project, h in zip(self.projections, hidden, strict=True))
        uniform_S = batch.uniform(self.seed, step)
        id_S, logp_S = sample(
            logits_SV, batch.temperature_S, uniform_S, batch.top_k, batch.top_p, self.valid_vocab, *mask
        )
        ended = []
        for slot, (token, logp) in enumerate(zip(id_S.tolist(), logp_S.tolist(), strict=True)):
            completion = batch.completions[slot]
            completion.ids.append(token)
            completion.logp.append(logp)
            finish = self._finish(completion, batch.asked[slot])
            if finish is not None:
                completion.finish = finish
                ended.append(slot)
        return ended

    def _finish(self, completion: Completion, request: Request) -> Finish | None:
        if completion.ids[-1] in self.eos:
            return "eos"
        stops = request.sampling.stop
        if stops and self.text_of is not None:
            recent = completion.ids[-(max(len(s) for s in stops) + PIECE) :]
            if any(stop in self.text_of(recent) for stop in stops):
                return "stop"
        return "length" if len(completion.ids) >= request.sampling.max_tokens else None

    def _check(self, requests: Sequence[Request]) -> None:
        context = self.runner.config.context
        for number, request in enumerate(requests):
            length, limit = len(request.prompt_ids), request.sampling.max_tokens
            if not length:
                raise DataError(f"prompt {number} has no tokens", "give it at least one, or a BOS")
            if tokens_seen(self.runner.needs_source, length, limit) > context:
                raise DataError(
                    f"prompt {number} has {length} tokens and may get {limit} more; the model's context is {context}",
                    "shorten the prompt or lower max_tokens",
                )
            if request.sampling.stop and self.text_of is None:
                raise DataError(f"prompt {number} has stop texts but the engine has no tokenizer", "give it text_of")


def _retire(scheduler: Scheduler, ended: Sequence[int], caches: Sequence[Cache]) -> None:
    for source, target in scheduler.retire(ended):
        for cache in caches:
            cache.move(source, target)
