"""Have a warm engine count the tokens of jobs that are refused when a prompt is too long."""

import time
from collections.abc import Callable, Iterable

from promptdrop.errors import Problem
from promptdrop.nouns import ImageSpec
from promptdrop.pool.messages import Tokens
from promptdrop.request.problems import MAX_PROBLEMS
from promptdrop.spool.job import Job
from promptdrop.supervisor.work import Running, Work


class Measuring:
    """Asks engines how long prompts are, then reports each job as one that fits or is too long."""

    def __init__(
        self,
        work: Work,
        fits: Callable[[Running], None],
        too_long: Callable[[Running, list[Problem]], None],
    ) -> None:
        self.waiting: list[Running] = []  # for a warm engine
        self.asked: dict[int, Running] = {}  # by ticket
        self._work, self._fits, self._too_long = work, fits, too_long

    def add(self, running: Running) -> None:
        """Measure a job, as soon as an engine is warm."""
        self.waiting.append(running)
        self.ask()

    def ask(self) -> None:
        """Ask a warm engine, if there is one, about the jobs that wait."""
        if link := self._work.pool.first_warm():
            for running in self.waiting:
                ticket = self._work.next_ticket()
                self.asked[ticket] = running
                texts = dict.fromkeys(text for _, _, text in _texts(running.job))
                link.count_tokens(ticket, tuple(texts), time.monotonic())
            self.waiting = []

    def ask_again(self, tickets: Iterable[int]) -> None:
        """Ask another engine, because the one that was asked has died."""
        lost = [ticket for ticket in tickets if ticket in self.asked]
        self.waiting += [self.asked.pop(ticket) for ticket in lost]
        self.ask()

    def forget(self, running: Running) -> None:
        """Drop a job that somebody cancels; an answer about it is ignored."""
        self.waiting = [other for other in self.waiting if other is not running]
        self.asked = {ticket: other for ticket, other in self.asked.items() if other is not running}

    def answered(self, answer: Tokens) -> None:
        """Decide about a job whose texts were counted."""
        running = self.asked.pop(answer.ticket, None)
        if running is None:
            return
        if problems := _problems(running.job, answer.counts):
            self._too_long(running, problems)
        else:
            self._fits(running)


def _problems(job: Job, counts: tuple[int, ...]) -> list[Problem]:
    """Name each text with more than prompt.max_tokens tokens; at most MAX_PROBLEMS of them."""
    limit = job.settings.prompt.max_tokens
    tokens = dict(zip(dict.fromkeys(text for _, _, text in _texts(job)), counts, strict=True))
    return [
        Problem(
            f"image {spec.image}: the {field} has {tokens[text]} tokens with its template,"
            f" more than prompt.max_tokens: {limit}",
            field=field,
        )
        for spec, field, text in _texts(job)
        if tokens[text] > limit
    ][:MAX_PROBLEMS]


def _texts(job: Job) -> list[tuple[ImageSpec, str, str]]:
    """Every text of a job that the encoder is given: (image, field, text)."""
    texts = [(spec, "prompt", spec.prompt) for spec in job.specs]
    return texts + [
        (spec, "negative_prompt", spec.negative_prompt)
        for spec in job.specs
        if spec.negative_prompt and spec.guidance_scale > 0
    ]
