"""What a training run needs besides the losses: gradients, shards, strategies, checkpoints, reference values."""
