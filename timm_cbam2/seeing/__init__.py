"""What the attention decided, shown: pictures of masks, health in numbers and words, reports, the page.

Everything rests on `record_attention`, and nothing here changes what a model computes. The commands' names and the
numbers they write are contracts; how a picture or a page looks may change freely.
"""
