"""The Unix socket between a daemon and the workers and commands on its machine: RPC frames, long tails as memfds."""
