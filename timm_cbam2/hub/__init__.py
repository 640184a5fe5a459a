"""Model folders and what is done with them: saving, cards, push and pull, a Space, export, the zoo's list.

What a model folder holds (`config.json`, `model.safetensors`, `README.md`) and what a run folder says of itself
(`run.json`, `metrics.jsonl`) are contracts, read by later versions and by other libraries. Wording and the commands'
output may change freely.
"""
