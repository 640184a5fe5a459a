"""CBAM2 in networks that exist already: put in at the identity, taken out, saved with what was put where, read back.

Which blocks of which library are understood, and where their attention sits, is a contract: the names are in saved
files (`cbam2.json`) and in state dicts. How a network is searched and probed may change freely.
"""
