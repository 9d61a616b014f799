"""`cascade-bench`: cascade-rt and PyTorch on the same weights, inputs and threads, in one run.

cli        what to race, and who
prepare    bundles with the weights that everyone uses
jobs       one racer and its task; the tensors of a task
race       fresh processes, taken in turns; medians, ratios, errors
processes  the environment of timed processes
worker     the process of one racer
peers      what a racer calls: our engines, diffusers' modules, the same compiled
startup    what is timed from outside: imports, process start to PNG
roofline   what the machine can do at best, and what a task asks of it
report     JSON, table, plot
"""
