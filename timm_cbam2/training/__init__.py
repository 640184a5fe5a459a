"""The fine-tuning loop: its options, checkpoints, launching, recipes and the run folder it leaves.

A contract: the options' names, exit codes, and that a run which was stopped or killed ends bit-identical to one
left alone. `python -m timm_cbam2.finetune` starts it, and what looks on while it trains registers itself here.
"""
