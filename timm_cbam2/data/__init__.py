"""Where labelled images come from and how they become batches: folders, tables, streams, caches, timm's transforms.

A run finds the same images, order and augmentation again from its settings alone: that is the contract, since resuming
to the bit rests on it. How images are listed, read and kept may change freely.
"""
