"""What surrounds a training loop: optimizers, resume state, log and progress, adapters,
sharding."""
