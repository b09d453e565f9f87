"""What attention has read already, kept for the next passes."""
import torch


class Cache:
    """Keys and values of all T positions of a canvas, per layer [B, G, T, C].

    A forward pass of S tokens writes their keys and values at their positions and attends to the
    first `length` positions. sampling/engine.py sets `length` and `rows` and says which positions
    it feeds: one for autoregressive decoding, a block or more for diffusion. model.py then calls
    `place` once a pass and `update` in each layer.
    """

    def __init__(self, config, batch_size, length, device=None, dtype=None):
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length    # positions that are in use, from the first on
        self.rows = None        # int64 [A]: the next pass is for these rows of the batch; None: all
        self.places = None      # int64 [A * G * S]: where the next pass writes, see `place`

    def place(self, positions, A):
        """The next pass writes its keys and values at positions [S] or [A, S] of A rows."""
        G, T = self.keys.shape[2:4]
        device = positions.device
        rows = torch.arange(A, device=device) if self.rows is None else self.rows
        heads = rows[:, None] * G + torch.arange(G, device=device)                      # [A, G]
        places = heads[..., None] * T + positions.expand(A, -1)[:, None]              # [A, G, S]
        self.places = places.flatten()                  # of B * G * T

    def update(self, layer, k, v):
        """Write k, v [A, G, S, C] where `place` said. Returns all keys and values in use of those
        rows, [A, G, length, C] each."""
        found = []
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):      # [B, G, T, C] each
            C = kept.shape[-1]
            kept.view(-1, C).index_copy_(0, self.places, new.reshape(-1, C).to(kept.dtype))
            in_use = kept[:, :, :self.length]
            found.append(in_use if self.rows is None else in_use[self.rows])
        return found
