"""Which part earns its place? A grid of trainings that anybody can rerun, its results, and what they say.

`python -m timm_cbam2.ablation run --data IMAGES` trains what `grid.yaml` asks for and goes on wherever it was stopped;
`results.jsonl` holds a line for each training that was finished here.
"""
