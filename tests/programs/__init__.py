"""Random distributed programs: written, run by the workers, and run by one process to compare.

`program` is what a program is, `strategies` draws one, `reference` runs it in one process with
torch alone, `distributed` runs it on the workers of a `fleet`, and `compare` tells the two apart.
"""
