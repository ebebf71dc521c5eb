"""A worker on a roster that heals: python roster_worker.py SPACE STAGES

The model is cut into stages, and each needs a worker. All workers share a space: who serves which stage stands in its
map, and who is alive in its presence. When one dies, the others see it, and a spare takes its place. No server decides.
"""

import sys
import time

import lattica

space, stages = sys.argv[1], int(sys.argv[2])

with lattica.connect() as lat:
    me = lat.id()["peer_id"]
    roster = lat.space(space)
    with roster.present({"role": "worker"}):  # until this program ends, however it ends
        while True:
            alive = {member["peer_id"] for member in roster.members()}
            serving = dict(roster.map("stages").items())
            gaps = [f"stage {n}" for n in range(stages) if serving.get(f"stage {n}") not in alive]
            spares = sorted(alive - set(serving.values()))
            if gaps and spares and me == spares[0]:  # one at a time; were there two, the space keeps one of them
                roster.map("stages")[gaps[0]] = me
                print(f"{me} takes {gaps[0]}", flush=True)
            time.sleep(0.2)
