"""What docs/reliability.md promises, tried on many inputs: ``make campaign``.

Each module is a part. Inputs follow from a seed, and are bounded; a table of counts is the end.
"""
