"""The checks of the suite: one function for each question, which takes a target, a subject and a ledger.

A check raises `Failure`, or whatever the library under test raises, when the answer is wrong. It enters the largest
error of the answers in the ledger.
"""

__all__: list[str] = []
