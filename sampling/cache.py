"""What attention has read already, kept for the next passes."""
import torch


class Cache:
    """Keys and values of all T positions of a canvas, per layer [B, G, T, C].

    A forward pass of S tokens writes their keys and values at their positions and attends to all T.
    sampling/engine.py says which positions it feeds: one for autoregressive decoding, a block or
    more for diffusion.
    """

    def __init__(self, config, batch_size, length, device=None, dtype=None):
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length
        self.rows = None        # int64 [A]: the next pass is for these rows of the batch; None: all

    def update(self, layer, positions, k, v):
        """Write k, v [A, G, S, C] at positions [S] or [A, S]. Returns all keys and values of those
        rows, [A, G, T, C] each."""
        positions = positions.expand(k.shape[0], -1)                                    # [A, S]
        rows = torch.arange(len(k), device=k.device) if self.rows is None else self.rows
        keys, values = self.keys[layer], self.values[layer]                           # [B, G, T, C]
        keys[rows[:, None], :, positions] = k.transpose(1, 2).to(keys.dtype)          # [A, S, G, C]
        values[rows[:, None], :, positions] = v.transpose(1, 2).to(values.dtype)
        if self.rows is None:
            return keys, values
        return keys[rows], values[rows]
