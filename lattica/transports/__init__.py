"""Ways to reach a peer directly: QUIC and TCP."""
