"""The paper's Table 2: language models whose ranges learn while their weights do not.

protocol: how every cell is run. subject: a model and its text. cell: one cell. results: what a
folder of results holds. run: all cells, on one process or several. table, plots: what is reported.
"""
