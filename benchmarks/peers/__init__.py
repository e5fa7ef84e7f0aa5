"""What the benchmarks run in processes of their own.

`this_package`, `torch_rpc`, `plain_pyzmq` and `pyzmq_asyncio` echo tensors, as a server and as a
client, for `round_trip.py`.  The `split_*` train a split model, as a trainer and its workers, for
`split_mlp.py`, `chain.py` and `profile_pass.py`.
"""
