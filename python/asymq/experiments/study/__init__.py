"""Which settings a quantized model learns best with: a tree of questions, answered in turn.

setting: what a cell is. subject: model, text, and what all cells share. cell: one training.
results, about: what a folder of them holds. tree: the questions, their cells and winners. run: all
of them. table, plots: what is reported. recommend: the settings that asymq.recommended returns.
peers: the same training by other libraries.
"""
