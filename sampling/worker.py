"""The thread of the server that owns the model: requests wait in its queue, and those with the same
sampler settings share a batch, whatever their seeds."""
import collections
import dataclasses
import functools
import queue
import secrets
import threading

import kernels
from common import seed_for
from sampling.trace import Trace

MAX_BATCH = 16      # rows in a forward pass; also the largest n times prompts of one request
MAX_QUEUE = 64      # requests waiting; one more gets 429


class Refusal(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self):
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}


class Job:
    """One request: sequences with one set of arguments. `events` receives (message of the Trace,
    finished tokens of each row) for each step, if `watched`, and at last None."""

    def __init__(self, sequences, arguments, gaps=False, watched=False, chat=False):
        self.sequences, self.arguments = sequences, dict(arguments)
        self.gaps, self.watched, self.chat = gaps, watched, chat
        seed = self.arguments.pop("seed")
        if seed is None:
            seed = secrets.randbits(62)
        # One a row, so that each gets in a batch what it gets alone.
        others = range(1, len(sequences))
        self.seeds = [seed] + [seed_for("sequence of a request", seed, i) for i in others]
        self.events, self.trace = queue.SimpleQueue(), None
        self.result = self.error = None
        self.cancelled = False                          # set when the client has gone

    def key(self):
        """Jobs with equal keys may share a batch."""
        return self.gaps, tuple(sorted(self.arguments.items()))


class Cancelled(Exception):
    """Nobody waits for this batch any more."""


class Worker(threading.Thread):
    """The only thread that runs the model."""

    def __init__(self, sampler, max_queue=MAX_QUEUE):
        super().__init__(daemon=True)
        self.sampler, self.max_queue, self.jobs = sampler, max_queue, collections.deque()
        self.change = threading.Condition()             # of jobs or stopping
        self.passes, self.batches, self.stopping = 0, 0, False

    def submit(self, job):
        """Raises Refusal, 429, when too many wait."""
        with self.change:
            if len(self.jobs) >= self.max_queue:
                raise Refusal(429, f"{len(self.jobs)} requests are waiting already: try again "
                              "later", code="overloaded")
            self.jobs.append(job)
            self.change.notify()

    def stop(self):
        """End after the current step: a thread inside torch must not outlive the interpreter."""
        with self.change:
            self.stopping = True
            self.change.notify()
        if self.is_alive():
            self.join(10)

    def run(self):
        with kernels.packed(self.sampler.model):        # once, and not for every request
            batch = self.next_batch()
            while batch:
                self.work(batch)
                batch = self.next_batch()

    def next_batch(self):
        """The oldest job and those after it that fit to it, MAX_BATCH rows at most; None at the
        end."""
        with self.change:
            while not self.jobs and not self.stopping:
                self.change.wait()
            if self.stopping:
                return None
            batch = [self.jobs.popleft()]
            rows, key = len(batch[0].sequences), batch[0].key()
            for job in list(self.jobs):
                if job.key() == key and rows + len(job.sequences) <= MAX_BATCH:
                    self.jobs.remove(job)
                    batch.append(job)
                    rows += len(job.sequences)
            return batch

    def work(self, batch):
        """Run the jobs of a batch together; if that fails, each alone, so that a mistake in one is
        no other's trouble."""
        batch = [job for job in batch if not job.cancelled]
        if not batch:
            return
        try:
            self.run_together(batch)
        except Cancelled:
            for job in batch:
                job.error = Refusal(503, "the server is shutting down")
        except Exception as error:  # noqa: BLE001  whatever it was, the next request is answered
            if len(batch) > 1:
                for job in batch:
                    self.work([job])
                return
            batch[0].error = Refusal(500, f"{type(error).__name__}: {error}")
            if isinstance(error, ValueError):
                batch[0].error = Refusal(400, str(error))
        for job in batch:
            if job.watched and job.result is not None:
                job.trace.finish()
            job.events.put(None)

    def run_together(self, batch):
        """Give each job its result. Raises what the sampler raises, and Cancelled."""
        parts, sequences, seeds = [], [], []
        for job in batch:
            watch = functools.partial(self.tell, job) if job.watched else None
            job.trace = Trace(self.sampler, job.arguments["remasking"], watch)
            parts.append(slice(len(sequences), len(sequences) + len(job.sequences)))
            sequences += job.sequences
            seeds += job.seeds

        def on_step(step):
            if self.stopping or all(job.cancelled for job in batch):
                raise Cancelled
            self.passes += 1
            for job, part in zip(batch, parts):
                job.trace.passes = step.number
                if job.watched and not job.cancelled:
                    job.trace(rows_of(step, part))

        self.batches += 1
        arguments = {**batch[0].arguments, "seed": seeds}
        results = self.sampler.run(sequences, arguments, batch[0].gaps, on_step)
        for job, part in zip(batch, parts):
            job.result = results[part]

    def tell(self, job, trace, message):
        """Hand a message of its Trace to the thread that answers the client."""
        if message.get("changes") != []:
            # The canvas goes on changing: what is finished is read here.
            settled = trace.settled or [None] * len(trace.canvas)
            rows = [self.finished(*each) for each in zip(trace.canvas, settled)]
            job.events.put((message, rows))
        trace.messages.clear()                          # nobody plays it again

    def finished(self, row, settled):
        """The tokens of a row that can be sent: those before its first mask and, as what was sent
        cannot be taken back, no more than the `settled` first ones that will stay; None: all do."""
        mask_id = self.sampler.mask_id
        end = row.index(mask_id) if mask_id in row else len(row)
        return row[:end if settled is None else min(end, settled)]


def rows_of(step, part):
    """The Step of some rows of a batch."""
    settled = None if step.settled is None else step.settled[part]
    return dataclasses.replace(
        step, tokens=step.tokens[part], revealed=step.revealed[part],
        confidence=step.confidence[part], lengths=step.lengths[part], settled=settled)
