"""The scaling law of quantization-aware training: trained, fitted, predicted.

cells: what is trained. corpus: text of the packages of a Python environment. tokens: a text as
tokens. training: one cell. runs: the results. sweep: all cells, on one process or several. fit,
estimates: laws of runs. table, plots, claims: what is reported of them. step: what a step costs.
"""
