"""Kademlia as libp2p speaks it: who provides this content, where is this peer, small signed values.

`messages` is the wire, `routing` the table of peers, `lookup` the iterative search, `records` decides which values are
valid, `store` keeps provider records and values, `server` answers requests, `admission` bounds what one peer may ask.
None of them does I/O; `lattica.kad` drives them.
"""
