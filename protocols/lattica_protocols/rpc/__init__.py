"""Calls with tensors over one long-lived stream: frames, the machine, values. Wire: `specs/rpc.md`."""
