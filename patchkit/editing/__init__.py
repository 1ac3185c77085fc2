"""Facts to factors: recipes, targets, keys, statistics, the solve, and the editors made of them.

Importing this package imports no torch; its modules do.
"""
