"""The block, the networks that carry it, their configuration and the two doors (timm and transformers).

All files here travel to the Hub as remote code, so each imports only files beside it, as `from .name import x`; what
lies elsewhere (a compiled kernel) registers itself here instead. Option names, state-dict keys and what a saved
configuration means are contracts for ever; how the values are computed may change freely.
"""
