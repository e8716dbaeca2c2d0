"""Rivals of the diffusion generator: what else draws from a density known by its energy, each within the same budget.

Each module has a function of (target, budget, ...) that spends at most the budget and gives `Drawn`: draws, their
energies, log-weights where it has them, and what it cost. Targets are callables with `dim`: U(x (B, d)) -> (B,),
reduced energies at temperature 1.
"""
