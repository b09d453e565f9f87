"""Work that a thread does while the step before it is still computing."""
from concurrent.futures import ThreadPoolExecutor


class Ahead:
    """ahead(n) is work(n); afterwards a thread begins with work(n + 1), which is then there when it
    is asked for. `work` must be a function of n alone."""

    def __init__(self, work):
        self.work, self.pool = work, ThreadPoolExecutor(1)
        self.number, self.future = None, None

    def __call__(self, number):
        if number != self.number:
            self.begin(number)
        result = self.future.result()
        self.begin(number + 1)
        return result

    def begin(self, number):
        self.number, self.future = number, self.pool.submit(self.work, number)
