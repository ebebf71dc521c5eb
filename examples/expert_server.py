"""A worker that serves. It talks to the daemon on its machine; start one first: `lattica up`."""

import time

import numpy as np

import lattica


class Expert:
    def __init__(self) -> None:
        self.weights = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ self.weights, 0)

    def generate(self, prompt: str):
        for word in prompt.split():
            yield word.upper()


with lattica.connect() as lat:
    lat.serve("expert", Expert())  # every peer can call it now
    print("serving on", lat.id()["peer_id"], flush=True)
    while True:
        time.sleep(3600)
