"""Every figure of a run derived again from its raw samples, and what does not hold.

checks   the nouns: a check, and how it came out
run      all checks of a run; peaks, energy, rounds, state and origin are one module each
"""
