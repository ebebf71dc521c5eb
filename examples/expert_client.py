"""A worker on another machine that calls it: python expert_client.py PEER_ID"""

import sys

import numpy as np

import lattica

peer = sys.argv[1]
with lattica.connect() as lat:
    x = np.ones((8, 512), dtype=np.float32)
    y = lat.call(peer, "expert.forward", x, timeout=5)
    print("forward gave", y.dtype, y.shape)

    for token in lat.stream(peer, "expert.generate", "hello there"):
        print(token)
