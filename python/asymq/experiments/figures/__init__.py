"""The paper's figures, Tables 1 and 3, and its claims.

toy_problem: the controlled experiment. gradients: Tables 1 and 3. claims: what the paper says of
them, and whether it holds. losses: Figure 4, from results of Table 2. run: what is trained, and
all files. plots: the pictures.
"""

# How every figure is trained, unless told otherwise.
SEEDS, STEPS = 5, 5000
