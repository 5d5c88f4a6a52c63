"""Whether a scheduled share of changing codes, or holding those that oscillate, helps.

Every optimizer with a cosine learning rate, against the same with TransitionRateScheduler and with
iterative freezing, at the same budget and with the same seeds.

protocol: what is run. tasks: what is learned. cell: one run. results: what a folder of them holds.
run: all of them. table, plots: what is reported.
"""
