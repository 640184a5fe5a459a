"""What was measured, and the programs that measured it: ablation, benchmark, and the checkpoints that are shipped.

A number in the README stands in a results file here, with the command that makes it again; results are only ever added
by running that command. The programs may change as long as a result says which version of the code it is of.
"""
