"""Of paths to a peer: whether one is alive."""
