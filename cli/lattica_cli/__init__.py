"""The `lattica` command. It speaks to the daemon through the same RPC as everybody else and never imports it."""
