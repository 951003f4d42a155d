"""The same work by other people's packages, each in a process of its own: beside it ours, and plain torch hooks.

A module a package. Its `ways(question)` are what a user of that package would write, first as its documentation has it,
then as well as we could make it; `Cannot` says what it has no way to.
"""
