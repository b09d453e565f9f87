"""The documents of a prepared data set one by one, where the loader serves windows of the stream:
for models that write a text from its beginning to its end."""
import functools

import numpy as np

from data.loader import positions_of


class Documents:
    """Documents of TokenDataset's splits as lists of ids, each after `first`, a token that stands
    in front of every text.

    A document ends at the data set's end of text, which is not part of it: its length says the
    same. Longer ones are cut into pieces of at most longest - 1 tokens. Raises ValueError for a
    split without any, and for longest below 2.
    """

    def __init__(self, data, first, longest):
        if longest < 2:
            raise ValueError("seq_len must be at least 2, a token to begin with and one of text, "
                             f"got {longest}")
        self.data, self.first = data, first
        self.places = {split: find_documents(getattr(data, split), data.eos_token_id, longest - 1)
                       for split in ("train", "val")}
        for split, places in self.places.items():
            if not len(places):
                raise ValueError(f"the {split} split of {data.meta['name']} holds no documents")

    def get(self, split, index):
        """A document of a split."""
        begin, end = self.places[split][index]
        return [self.first, *map(int, getattr(self.data, split)[begin:end])]

    def batch(self, split, batch_size, seed, step, piece=0, slices=1):
        """The documents of one of the `slices` pieces of a step, a list of lists. An epoch visits
        each once, in an order that follows from (seed, epoch)."""
        number = len(self.places[split])
        steps_of_epoch = max(1, number // (batch_size * slices))
        epoch, step = divmod(step, steps_of_epoch)
        order = epoch_order(number, seed % 2**64, epoch)
        begin = (step * slices + piece) * batch_size
        return [self.get(split, order[i % number]) for i in range(begin, begin + batch_size)]

    def some(self, split, max_tokens):
        """The first documents of a split with at most so many tokens together; at least one."""
        found, tokens = [], 0
        for index in range(len(self.places[split])):
            document = self.get(split, index)
            tokens += len(document)
            if found and tokens > max_tokens:
                break
            found.append(document)
        return found


@functools.lru_cache(maxsize=4)
def epoch_order(number, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(number)


def find_documents(ids, separator, longest):
    """int64 [N, 2]: where each document begins and ends, cut to pieces of `longest`."""
    ends = np.array([len(ids)])
    if separator is not None:
        ends = np.append(positions_of(ids, separator), len(ids))
    begins = np.concatenate(([0], ends[:-1] + 1))
    places = []
    for begin, end in zip(begins.tolist(), ends.tolist()):
        for start in range(begin, end, longest):
            places.append((start, min(start + longest, end)))
    return np.array(places, dtype=np.int64).reshape(-1, 2)
