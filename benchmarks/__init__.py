"""What patchkit costs and what its edits are worth, measured: ``python -m benchmarks``.

One section is one module with a function ``measure(effort)``. Times are compared within one run, as
ratios; results go to JSON, so that runs can be compared. Not part of the installed package.
"""
