"""The scaling law of quantization-aware training: trained, fitted, predicted.

cells: what is trained. corpus: text from the packages of a Python environment. tokens: a text as
tokens. training: one cell. runs: the results. run: all cells, on one process or several. fit: laws
of runs, with the table, `claims` what they bear out, `plots`. step: what a step costs.
"""
