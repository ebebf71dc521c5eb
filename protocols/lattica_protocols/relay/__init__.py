"""Circuit relay v2: a peer that others can reach carries the connections of peers that they cannot reach.

`messages` has the wire format, `voucher` the signed proof of a reservation, `admission` what a relay grants to whom,
`fairness` how it shares its bandwidth, and `keeper` how a peer behind a NAT keeps reservations.
"""
