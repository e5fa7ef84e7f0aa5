"""The peers of `round_trip.py`: one module each, the same echo, run as a server and as a client."""
