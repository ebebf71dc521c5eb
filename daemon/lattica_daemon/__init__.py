"""The long-running service: settings, state directory, local socket, logs, and the `daemon` service of clients."""
