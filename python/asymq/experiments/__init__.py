"""The paper's experiments, a folder each, and what they share in ``common``.

The commands are in the scripts/ folder of the repository. ``common`` imports none of the others;
figures takes the results of table2 for its Figure 4, otherwise they do not know each other.
"""
