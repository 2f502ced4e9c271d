"""What is asked of every backend: one function a question, each given a target, a case and a ledger.

A check raises `Failure` (or whatever the library under test raises) when the answer is wrong, and enters in the
ledger how far off the worst answer was.
"""
