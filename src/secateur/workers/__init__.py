"""Processes that load one model in one runtime and time it, for `secateur bench`: one small module a runtime.

They import nothing of Secateur that needs more than the runtime brings, so that it may live in another environment.
"""
